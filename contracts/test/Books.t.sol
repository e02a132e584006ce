// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ISwarmCoordinator} from "../src/ISwarmCoordinator.sol";
import {SwarmCoordinator} from "../src/SwarmCoordinator.sol";
import {Fixture, vm} from "./Fixture.sol";

/// Rewards, votes and registrations, for arguments of every kind.
contract BooksTest is Fixture {
    address private constant ANNA = address(0xa11a);
    address private constant BERT = address(0xbe27);

    function advance(uint256 rounds) private {
        for (uint256 i = 0; i < rounds; i++) coordinator.updateStageAndRound();
    }

    function testFuzz_rewardIsCreditedOnceWhereItFits(uint256 round, uint256 stage, int256 reward) public {
        round %= 6;
        stage %= 3;
        register(ANNA, "a");
        advance(3);
        bytes4 refusal;
        if (round > 3) refusal = ISwarmCoordinator.InvalidRoundNumber.selector;
        else if (stage > 0) refusal = ISwarmCoordinator.InvalidStageNumber.selector;
        else if (reward != int256(int128(reward))) refusal = SwarmCoordinator.RewardOutOfRange.selector;
        if (refusal != 0) vm.expectRevert(refusal);
        vm.prank(ANNA);
        coordinator.submitReward(round, stage, reward, "a");
        vm.assertEq(totalOf("a"), refusal == 0 ? reward : int256(0));
        if (refusal != 0) return;

        vm.expectRevert(ISwarmCoordinator.RewardAlreadySubmitted.selector);
        vm.prank(ANNA);
        coordinator.submitReward(round, stage, int256(1), "a");
        (bool submitted, int256 found) = coordinator.getPeerReward(round, stage, "a");
        vm.assertTrue(submitted);
        vm.assertEq(found, reward);
        vm.assertTrue(coordinator.hasSubmittedRoundStageReward(round, stage, "a"));
        vm.assertTrue(coordinator.hasSubmittedRoundStageReward(round, stage, ANNA));
    }

    /// Release 0.4.2 is asked by account, release 0.6.0 by peer: one account's peers are told apart.
    function test_bothReleasesAreAnsweredWhoHasSubmitted() public {
        register(ANNA, "a");
        register(ANNA, "b");
        vm.prank(ANNA);
        coordinator.submitReward(0, 0, int256(5), "a");
        vm.assertTrue(coordinator.hasSubmittedRoundStageReward(0, 0, ANNA));
        vm.assertTrue(coordinator.hasSubmittedRoundStageReward(0, 0, "a"));
        vm.assertFalse(coordinator.hasSubmittedRoundStageReward(0, 0, "b"));
        vm.assertFalse(coordinator.hasSubmittedRoundStageReward(0, 0, "unknown"));
    }

    function testFuzz_unsignedRewardNeverBecomesNegative(uint256 reward) public {
        register(ANNA, "a");
        bool fits = reward <= uint256(uint128(type(int128).max));
        if (!fits) vm.expectRevert(SwarmCoordinator.RewardOutOfRange.selector);
        vm.prank(ANNA);
        coordinator.submitReward(0, 0, reward, "a");
        vm.assertEq(totalOf("a"), fits ? int256(reward) : int256(0));
    }

    function testFuzz_onlyTheHolderSubmits(address holder, address sender) public {
        vm.assume(holder != sender && holder != address(0));
        register(holder, "a");
        string[] memory winners = new string[](1);
        winners[0] = "b";
        vm.expectRevert(ISwarmCoordinator.InvalidVoterPeerId.selector);
        vm.prank(sender);
        coordinator.submitReward(0, 0, int256(1), "a");
        vm.expectRevert(ISwarmCoordinator.InvalidVoterPeerId.selector);
        vm.prank(sender);
        coordinator.submitWinners(0, winners, "a");
    }

    function testFuzz_peerIdIsRegisteredOnce(string calldata peerId) public {
        uint256 length = bytes(peerId).length;
        bool fits = length > 0 && length <= 128;
        if (!fits) vm.expectRevert(SwarmCoordinator.InvalidPeerId.selector);
        register(ANNA, peerId);
        if (!fits) return;
        vm.expectRevert(ISwarmCoordinator.PeerIdAlreadyRegistered.selector);
        register(BERT, peerId);
        vm.assertEq(holderOf(peerId), ANNA);
        vm.assertEq(peersOf(ANNA)[0], peerId);
    }

    /// `picks` are peers of eight, the voter is number 0.
    function testFuzz_voteIsASetOfOthers(uint8[] calldata picks) public {
        register(ANNA, "p0");
        string[] memory winners = new string[](picks.length);
        uint256[8] memory named;
        bool valid = picks.length > 0;
        for (uint256 i = 0; i < picks.length; i++) {
            uint256 pick = picks[i] % 8;
            winners[i] = string.concat("p", vm.toString(pick));
            if (++named[pick] > 1) valid = false;
        }
        if (!valid) vm.expectRevert(ISwarmCoordinator.InvalidVote.selector);
        vm.prank(ANNA);
        coordinator.submitWinners(0, winners, "p0");
        // A vote for oneself stands, and is no win.
        for (uint256 peer = 0; peer < 8; peer++) {
            uint256 wins = valid && peer > 0 ? named[peer] : 0;
            vm.assertEq(coordinator.getTotalWins(string.concat("p", vm.toString(peer))), wins);
        }
        vm.assertEq(coordinator.getVoterVoteCount("p0"), valid ? 1 : 0);
        if (!valid) return;
        vm.expectRevert(ISwarmCoordinator.WinnerAlreadyVoted.selector);
        vm.prank(ANNA);
        coordinator.submitWinners(0, winners, "p0");
    }

    function test_emptyVoteIsRefusedAndUsesNothingUp() public {
        register(ANNA, "p0");
        vm.expectRevert(ISwarmCoordinator.InvalidVote.selector);
        vm.prank(ANNA);
        coordinator.submitWinners(0, new string[](0), "p0");
        string[] memory winners = new string[](1);
        winners[0] = "p1";
        vm.prank(ANNA);
        coordinator.submitWinners(0, winners, "p0");
        vm.assertEq(coordinator.getVoterVoteCount("p0"), 1);
    }

    function testFuzz_roundEndsOnlyAsExpected(uint256 expected) public {
        advance(2);
        if (expected != 2) vm.expectRevert(abi.encodeWithSignature("RoundMovedOn(uint256)", 2));
        coordinator.advanceRound(expected);
        vm.assertEq(coordinator.currentRound(), expected == 2 ? 3 : 2);
    }

    /// A page costs by its own length: 500 peers fit into what any node allows a call (geth: 50 million), and no board
    /// grows what a vote costs.
    function test_gasOfLeaderboardsIsBounded() public {
        uint256 first = _voteOf(0);
        for (uint256 i = 1; i < 499; i++) _voteOf(i);
        vm.assertLt(_voteOf(499), first * 2);

        uint256 gas = gasleft();
        (string[] memory peers,) = coordinator.winnerLeaderboard(0, 500);
        uint256 whole = gas - gasleft();
        gas = gasleft();
        (string[] memory page,) = coordinator.winnerLeaderboard(400, 410);
        uint256 part = gas - gasleft();
        vm.assertEq(peers.length, 500);
        vm.assertEq(page.length, 10);
        vm.assertEq(page[0], peers[400]);
        vm.assertLt(whole, 10_000_000);
        vm.assertLt(part, 250_000);
    }

    /// A new peer votes for another new one, and for one that has many votes. Returns the gas that it took.
    function _voteOf(uint256 number) private returns (uint256 gas) {
        string memory voter = _longId("QmVoter", number);
        string[] memory winners = new string[](2);
        (winners[0], winners[1]) = (_longId("QmOther", number), _longId("QmOther", number / 2 + 1000));
        register(ANNA, voter);
        vm.prank(ANNA);
        gas = gasleft();
        coordinator.submitWinners(0, winners, voter);
        gas -= gasleft();
    }

    /// As long as a peer id.
    function _longId(string memory kind, uint256 number) private pure returns (string memory) {
        return string.concat(kind, "Yo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7D", vm.toString(1000 + number));
    }
}
