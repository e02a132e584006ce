// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {SwarmCoordinator} from "../src/SwarmCoordinator.sol";
import {Fixture, vm} from "./Fixture.sol";
import {TestKeys} from "./TestKeys.sol";

/// A swarm in which everybody does anything in any order, and a second book in which it is written down by hand.
///
/// Peers 0 and 1 have keys. Every account tries to act for every peer; what must be refused must be refused.
contract Crowd is Fixture {
    uint256 public constant NUM_PEERS = 7;
    uint256 public constant NUM_ACCOUNTS = 4;

    struct Credit {
        uint256 count;
        int256 reward;
    }

    mapping(uint256 round => mapping(uint256 peer => Credit)) public credits;
    mapping(uint256 round => mapping(uint256 account => int256)) public accountSums;
    mapping(uint256 peer => int256) public totals;
    mapping(uint256 peer => address) public holders;
    mapping(uint256 peer => bool) public proofs;
    mapping(uint256 round => mapping(uint256 peer => bool)) public voted;
    mapping(uint256 peer => uint256) public wins;
    mapping(uint256 peer => uint256) public votes;
    uint256 public round;

    string[NUM_PEERS] private _ids;
    address[NUM_ACCOUNTS] private _accounts;
    bytes[2] private _keys;
    bytes[NUM_ACCOUNTS][2] private _signatures; // made before, as signing is slow

    constructor() {
        setUp();
        for (uint256 peer = 2; peer < NUM_PEERS; peer++) _ids[peer] = string.concat("peer-", vm.toString(peer));
        for (uint256 account = 0; account < NUM_ACCOUNTS; account++) _accounts[account] = vm.addr(account + 1);
        for (uint256 peer = 0; peer < 2; peer++) {
            TestKeys.Key memory key = peer == 0 ? TestKeys.first() : TestKeys.second();
            (_ids[peer], _keys[peer]) = (key.peerId, key.publicKey);
            for (uint256 account = 0; account < NUM_ACCOUNTS; account++) {
                _signatures[peer][account] = TestKeys.sign(key, registration(_accounts[account]));
            }
        }
    }

    function swarm() external view returns (SwarmCoordinator) {
        return coordinator;
    }

    function idOf(uint256 peer) public view returns (string memory) {
        return _ids[peer];
    }

    function accountOf(uint256 account) public view returns (address) {
        return _accounts[account];
    }

    // ---- what may happen

    function advance() external {
        coordinator.advanceRound(round);
        round++;
    }

    function registerPlainly(uint256 peer, uint256 account) external {
        (peer, account) = (peer % NUM_PEERS, account % NUM_ACCOUNTS);
        vm.prank(accountOf(account));
        try coordinator.registerPeer(idOf(peer)) {
            vm.assertEq(holders[peer], address(0));
            holders[peer] = accountOf(account);
        } catch {
            vm.assertTrue(holders[peer] != address(0), "a free peer was refused");
        }
    }

    function registerByProof(uint256 peer, uint256 account) external {
        (peer, account) = (peer % 2, account % NUM_ACCOUNTS);
        vm.prank(accountOf(account));
        try coordinator.registerPeerWithProof(idOf(peer), _keys[peer], _signatures[peer][account]) {
            vm.assertFalse(proofs[peer]);
            if (holders[peer] != accountOf(account)) totals[peer] = 0;
            holders[peer] = accountOf(account);
            proofs[peer] = true;
        } catch {
            vm.assertTrue(proofs[peer], "a proof was refused");
        }
    }

    function rebindByAccount(uint256 peer, uint256 from, uint256 to) external {
        (peer, from, to) = (peer % NUM_PEERS, _actor(peer % NUM_PEERS, from), to % NUM_ACCOUNTS);
        bytes memory signature = personalSignature(from + 1, rebinding(idOf(peer), accountOf(to)));
        bool agreed = holders[peer] == accountOf(from) && from != to;
        vm.prank(accountOf(to));
        try coordinator.rebindPeer(idOf(peer), "", signature) {
            vm.assertTrue(agreed, "moved without the holder's consent");
            holders[peer] = accountOf(to);
        } catch {
            vm.assertFalse(agreed);
        }
    }

    function reward(uint256 peer, uint256 account, uint256 ago, int64 amount) external {
        (peer, account) = (peer % NUM_PEERS, _actor(peer % NUM_PEERS, account));
        uint256 number = round + 1 - (ago % 4 > round + 1 ? 0 : ago % 4); // from the next round to two rounds ago
        bool fits = number <= round && holders[peer] == accountOf(account) && credits[number][peer].count == 0;
        vm.prank(accountOf(account));
        try coordinator.submitReward(number, 0, int256(amount), idOf(peer)) {
            vm.assertTrue(fits, "credited what must be refused");
            credits[number][peer] = Credit(credits[number][peer].count + 1, amount);
            accountSums[number][account] += amount;
            totals[peer] += amount;
        } catch {
            vm.assertFalse(fits);
        }
    }

    function vote(uint256 peer, uint256 account, uint8 set) external {
        (peer, account) = (peer % NUM_PEERS, _actor(peer % NUM_PEERS, account));
        string[] memory winners = _chosen(set);
        bool fits = winners.length > 0 && holders[peer] == accountOf(account) && !voted[round][peer];
        vm.prank(accountOf(account));
        try coordinator.submitWinners(round, winners, idOf(peer)) {
            vm.assertTrue(fits, "a vote that must be refused");
        } catch {
            vm.assertFalse(fits);
            return;
        }
        voted[round][peer] = true;
        votes[peer]++;
        for (uint256 i = 0; i < NUM_PEERS; i++) {
            if (i != peer && set >> i & 1 == 1) wins[i]++;
        }
    }

    /// Mostly the peer's holder, so that something happens; else anybody.
    function _actor(uint256 peer, uint256 account) private view returns (uint256) {
        for (uint256 i = 0; account % 4 > 0 && i < NUM_ACCOUNTS; i++) {
            if (accountOf(i) == holders[peer]) return i;
        }
        return account / 4 % NUM_ACCOUNTS;
    }

    function _chosen(uint8 set) private view returns (string[] memory winners) {
        uint256 count;
        for (uint256 i = 0; i < NUM_PEERS; i++) count += set >> i & 1;
        winners = new string[](count);
        for (uint256 i = NUM_PEERS; i > 0; i--) {
            if (set >> (i - 1) & 1 == 1) winners[--count] = idOf(i - 1);
        }
    }
}

contract InvariantsTest {
    Crowd private crowd;
    SwarmCoordinator private coordinator;

    function setUp() public {
        crowd = new Crowd();
        coordinator = crowd.swarm();
    }

    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(crowd);
    }

    struct FuzzSelector {
        address addr;
        bytes4[] selectors;
    }

    function targetSelectors() public view returns (FuzzSelector[] memory targets) {
        bytes4[] memory selectors = new bytes4[](6);
        selectors[0] = Crowd.advance.selector;
        selectors[1] = Crowd.registerPlainly.selector;
        selectors[2] = Crowd.registerByProof.selector;
        selectors[3] = Crowd.rebindByAccount.selector;
        selectors[4] = Crowd.reward.selector;
        selectors[5] = Crowd.vote.selector;
        targets = new FuzzSelector[](1);
        targets[0] = FuzzSelector(address(crowd), selectors);
    }

    /// A peer's total is the sum of what it was credited, an account's sum of a round that of what it submitted.
    function invariant_sumsOfRewardsAgree() public view {
        string[] memory ids = new string[](crowd.NUM_PEERS());
        for (uint256 peer = 0; peer < ids.length; peer++) ids[peer] = crowd.idOf(peer);
        int256[] memory totals = coordinator.getTotalRewards(ids);
        for (uint256 peer = 0; peer < ids.length; peer++) vm.assertEq(totals[peer], crowd.totals(peer));
        address[] memory accounts = new address[](crowd.NUM_ACCOUNTS());
        for (uint256 i = 0; i < accounts.length; i++) accounts[i] = crowd.accountOf(i);
        for (uint256 round = 0; round <= crowd.round(); round++) {
            int256[] memory sums = coordinator.getRoundStageReward(round, 0, accounts);
            for (uint256 i = 0; i < sums.length; i++) vm.assertEq(sums[i], crowd.accountSums(round, i));
        }
    }

    function invariant_oneCreditForARoundStageAndPeer() public view {
        for (uint256 round = 0; round <= crowd.round() + 1; round++) {
            for (uint256 peer = 0; peer < crowd.NUM_PEERS(); peer++) {
                (uint256 count, int256 credited) = crowd.credits(round, peer);
                (bool submitted, int256 reward) = coordinator.getPeerReward(round, 0, crowd.idOf(peer));
                vm.assertTrue(count <= 1, "credited twice");
                vm.assertTrue(submitted == (count == 1), "the books differ on what was submitted");
                vm.assertEq(reward, credited);
                (submitted,) = coordinator.getPeerReward(round, 1, crowd.idOf(peer));
                vm.assertFalse(submitted);
            }
        }
    }

    /// No longer than there are peers, in order, each peer once, and with the scores of the second book.
    function invariant_leaderboardsAreBoundedAndRight() public view {
        (string[] memory ids, uint256[] memory scores) = coordinator.winnerLeaderboard(0, type(uint256).max);
        _checkBoard(ids, scores, true);
        vm.assertEq(ids.length, coordinator.uniqueVotedPeers());
        (ids, scores) = coordinator.voterLeaderboard(0, type(uint256).max);
        _checkBoard(ids, scores, false);
        vm.assertEq(ids.length, coordinator.uniqueVoters());
    }

    function invariant_everyPeerHasOneHolder() public view {
        uint256 held;
        for (uint256 account = 0; account < crowd.NUM_ACCOUNTS(); account++) {
            address[] memory accounts = new address[](1);
            accounts[0] = crowd.accountOf(account);
            string[] memory ids = coordinator.getPeerId(accounts)[0];
            held += ids.length;
            for (uint256 i = 0; i < ids.length; i++) {
                (address holder,,) = coordinator.getPeerBinding(ids[i]);
                vm.assertEq(holder, accounts[0]);
            }
        }
        for (uint256 peer = 0; peer < crowd.NUM_PEERS(); peer++) {
            (address holder, bool proven,) = coordinator.getPeerBinding(crowd.idOf(peer));
            vm.assertEq(holder, crowd.holders(peer));
            vm.assertTrue(proven == crowd.proofs(peer), "the books differ on a proof");
            if (holder != address(0)) held--;
        }
        vm.assertEq(held, 0);
    }

    function _checkBoard(string[] memory ids, uint256[] memory scores, bool areWins) private view {
        vm.assertTrue(ids.length <= crowd.NUM_PEERS(), "longer than there are peers");
        uint256 listed;
        for (uint256 i = 0; i < ids.length; i++) {
            vm.assertTrue(i == 0 || scores[i - 1] >= scores[i], "not in descending order");
            for (uint256 peer = 0; peer < crowd.NUM_PEERS(); peer++) {
                if (keccak256(bytes(ids[i])) != keccak256(bytes(crowd.idOf(peer)))) continue;
                vm.assertEq(scores[i], areWins ? crowd.wins(peer) : crowd.votes(peer));
                vm.assertTrue(listed >> peer & 1 == 0, "listed twice");
                listed |= 1 << peer;
            }
        }
        for (uint256 peer = 0; peer < crowd.NUM_PEERS(); peer++) {
            uint256 score = areWins ? crowd.wins(peer) : crowd.votes(peer);
            vm.assertTrue(listed >> peer & 1 == (score > 0 ? 1 : 0), "missing, or listed without a score");
        }
    }
}
