// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {OwnableUpgradeable} from "@openzeppelin/contracts-upgradeable/access/OwnableUpgradeable.sol";
import {Initializable} from "@openzeppelin/contracts-upgradeable/proxy/utils/Initializable.sol";
import {PredictionMarket} from "../src/PredictionMarket.sol";
import {MarketFixture} from "./MarketFixture.sol";
import {vm} from "./Fixture.sol";

/// Who may do what in a game, and what it pays.
contract MarketTest is MarketFixture {
    // ---- money

    /// A random game pays out what was put in, but for less than one unit for each peer.
    function testFuzz_gamePaysWhatWasPutIn(uint256 seed) public {
        uint256 choices = 2 + seed % 5;
        uint256 right = seed / 5 % choices;
        uint256 game = open(3, choices, right);
        for (uint256 i = 0; i < 3 * NUM_PEERS; i++) {
            seed = uint256(keccak256(abi.encode(seed)));
            if (seed % 3 != 0) bet(game, i % NUM_PEERS, seed / 3 % choices, market.MIN_BET() + seed % (30 * TOKEN));
            if (i % NUM_PEERS == NUM_PEERS - 1) market.incrementRound(game);
        }
        uint256 put = market.totalBets(game);
        market.revealAnswer(game, right, SALT);
        uint256 paid;
        for (uint256 peer = 0; peer < NUM_PEERS; peer++) paid += claim(game, peer);
        vm.assertTrue(paid <= put, "more was paid than put in");
        vm.assertTrue(put < paid + NUM_PEERS, "money is missing");
    }

    /// Whatever is bet in between, a later bet on a choice gets no more shares for a token than an earlier one.
    function testFuzz_earlierBetBuysAtLeastAsMuch(uint256 seed) public {
        uint256 choices = 2 + seed % 3;
        uint256 game = open(5, choices, 0);
        uint256[] memory sharesOf = new uint256[](choices);
        uint256[] memory tokensOf = new uint256[](choices);
        for (uint256 i = 0; i < 5 * NUM_PEERS; i++) {
            seed = uint256(keccak256(abi.encode(seed)));
            uint256 choice = seed % choices;
            uint256 tokens = market.MIN_BET() + seed / 7 % (19 * TOKEN);
            uint256 shares = bet(game, i % NUM_PEERS, choice, tokens);
            if (tokensOf[choice] != 0) {
                vm.assertTrue(shares * tokensOf[choice] <= sharesOf[choice] * tokens, "a later bet was cheaper");
            }
            (sharesOf[choice], tokensOf[choice]) = (shares, tokens);
            if (i % NUM_PEERS == NUM_PEERS - 1) market.incrementRound(game);
        }
    }

    function testFuzz_probabilitiesAddUp(uint256 seed) public {
        uint256 game = open(2, 4, 0);
        for (uint256 peer = 0; peer < NUM_PEERS; peer++) {
            seed = uint256(keccak256(abi.encode(seed)));
            bet(game, peer, seed % 4, market.MIN_BET() + seed % (90 * TOKEN));
        }
        uint256 sum;
        for (uint256 choice = 0; choice < 4; choice++) {
            sum += market.impliedProbability(game, choice);
            vm.assertTrue(market.price(game, 0, choice) <= TOKEN, "a share costs more than a token");
        }
        vm.assertTrue(sum <= TOKEN && sum + 4 > TOKEN);
    }

    /// The attacker waits until the clues are all out and everybody has bet, and then bets on the right choice.
    function test_betAtTheLastMomentPaysLess() public {
        uint256 game = open(3, 2, 0);
        bet(game, 0, 0, 20 * TOKEN);
        bet(game, 1, 1, 20 * TOKEN);
        market.incrementRound(game);
        bet(game, 2, 0, 20 * TOKEN);
        market.incrementRound(game);
        bet(game, 3, 0, 20 * TOKEN);
        market.incrementRound(game);
        market.revealAnswer(game, 0, SALT);
        (uint256 first, uint256 second, uint256 last) = (claim(game, 0), claim(game, 2), claim(game, 3));
        vm.assertTrue(first > second && second > last, "a later bet was paid more");
        vm.assertTrue(claim(game, 1) < last, "a wrong bet was paid more");
    }

    /// The attacker bets next to nothing, at the last moment, on what nobody believes in, and is the only one right.
    function test_dustBetDoesNotTakeThePot() public {
        uint256 game = open(1, 4, 1);
        for (uint256 peer = 0; peer < 3; peer++) bet(game, peer, 0, 100 * TOKEN);
        bet(game, 3, 1, TOKEN / 1000);
        close(game);
        market.revealAnswer(game, 1, SALT);
        vm.assertTrue(claim(game, 3) < 8 * TOKEN / 1000, "dust took more than its odds");
        for (uint256 peer = 0; peer < 3; peer++) {
            uint256 back = claim(game, peer);
            vm.assertTrue(back <= 100 * TOKEN && back > 99 * TOKEN, "the others lost more than was won");
        }
    }

    function test_nobodyRightGivesAllBack() public {
        uint256 game = open(1, 3, 2);
        bet(game, 0, 0, 20 * TOKEN);
        bet(game, 1, 1, 30 * TOKEN);
        close(game);
        market.revealAnswer(game, 2, SALT);
        vm.assertEq(claim(game, 0), 20 * TOKEN);
        vm.assertEq(claim(game, 1), 30 * TOKEN);
        vm.assertEq(claim(game, 2), 0);
    }

    function test_eachEpochHasOneGrantThatIsNotSavedUp() public {
        vm.assertEq(market.betTokenBalance(idOf(0)), 100 * TOKEN);
        vm.assertEq(market.betTokenBalance("nobody"), 0);
        bet(open(1, 2, 0), 0, 0, 60 * TOKEN);
        vm.assertEq(market.betTokenBalance(idOf(0)), 40 * TOKEN);
        vm.warp(block.timestamp + 3 * market.EPOCH_SECONDS());
        vm.assertEq(market.betTokenBalance(idOf(0)), 140 * TOKEN);
    }

    // ---- bets

    function test_onlyThePeersAccountBetsAndClaims() public {
        uint256 game = open(1, 2, 0);
        vm.expectRevert(PredictionMarket.NotPeersAccount.selector);
        vm.prank(accountOf(1));
        market.guessAnswer(game, idOf(0), 0, 0, TOKEN);
        vm.expectRevert(PredictionMarket.NotPeersAccount.selector);
        vm.prank(accountOf(1));
        market.guessAnswer(game, "nobody", 0, 0, TOKEN);
        bet(game, 0, 0, TOKEN);
        close(game);
        market.revealAnswer(game, 0, SALT);
        vm.expectRevert(PredictionMarket.NotPeersAccount.selector);
        vm.prank(accountOf(1));
        market.claimReward(game, idOf(0));
    }

    function test_betIsMadeOnceInARoundAndForThatRound() public {
        uint256 game = open(2, 2, 0);
        bet(game, 0, 0, TOKEN);
        vm.expectRevert(PredictionMarket.AlreadyGuessed.selector);
        vm.prank(accountOf(0));
        market.guessAnswer(game, idOf(0), 0, 1, TOKEN);
        market.incrementRound(game);
        // On its way when the round ended: it is not moved to a round with another clue.
        vm.expectRevert(abi.encodeWithSelector(PredictionMarket.WrongRound.selector, 1));
        vm.prank(accountOf(1));
        market.guessAnswer(game, idOf(1), 0, 0, TOKEN);
        (bool made, uint256 choice, uint256 tokens,) = market.getGuess(game, idOf(0), 0);
        vm.assertTrue(made);
        vm.assertEq(choice, 0);
        vm.assertEq(tokens, TOKEN);
        (made,,,) = market.getGuess(game, idOf(1), 0);
        vm.assertFalse(made);
    }

    function testFuzz_betIsAtMostTheBalance(uint256 tokens) public {
        uint256 game = open(1, 2, 0);
        bytes memory refusal;
        if (tokens < market.MIN_BET()) refusal = abi.encodeWithSelector(PredictionMarket.BetTooSmall.selector);
        if (tokens > 100 * TOKEN) refusal = abi.encodeWithSelector(PredictionMarket.BetTooLarge.selector, 100 * TOKEN);
        if (refusal.length != 0) vm.expectRevert(refusal);
        vm.prank(accountOf(0));
        market.guessAnswer(game, idOf(0), 0, 1, tokens);
        vm.assertEq(market.totalBets(game), refusal.length == 0 ? tokens : 0);
    }

    // ---- the judge

    /// Whoever sees a reveal on its way can't bet any more, and no other answer fits the commitment.
    function test_revealCanNotBeFrontRunOrChanged() public {
        uint256 game = open(1, 2, 1);
        vm.expectRevert(PredictionMarket.GameNotOver.selector);
        market.revealAnswer(game, 1, SALT);
        bet(game, 0, 1, TOKEN);
        market.incrementRound(game);
        vm.expectRevert(PredictionMarket.BettingClosed.selector);
        vm.prank(accountOf(1));
        market.guessAnswer(game, idOf(1), 0, 1, TOKEN);
        vm.expectRevert(PredictionMarket.InvalidReveal.selector);
        market.revealAnswer(game, 0, SALT);
        vm.expectRevert(PredictionMarket.InvalidReveal.selector);
        market.revealAnswer(game, 1, SALT + 1);
        market.revealAnswer(game, 1, SALT);
        vm.expectRevert(PredictionMarket.GameNotOver.selector);
        market.revealAnswer(game, 1, SALT);
    }

    function test_judgeThatNeverRevealsLosesTheGame() public {
        uint256 game = open(2, 2, 1);
        bet(game, 0, 1, 10 * TOKEN);
        bet(game, 1, 0, 5 * TOKEN);
        close(game);
        (,,,, uint256 deadline) = market.getGame(game);
        vm.warp(deadline);
        vm.expectRevert(abi.encodeWithSelector(PredictionMarket.DeadlineNotReached.selector, deadline));
        market.cancelGame(game);
        vm.warp(deadline + 1);
        // Too late: those who would lose could only wait for that to cancel it first.
        vm.expectRevert(PredictionMarket.DeadlinePassed.selector);
        market.revealAnswer(game, 1, SALT);
        vm.prank(accountOf(3));
        market.cancelGame(game);
        vm.assertEq(claim(game, 0), 10 * TOKEN);
        vm.assertEq(claim(game, 1), 5 * TOKEN);
        vm.expectRevert(PredictionMarket.AlreadyClaimed.selector);
        vm.prank(accountOf(0));
        market.claimReward(game, idOf(0));
    }

    /// A client that knows only the existing ABI gets its money back by a claim.
    function test_claimCancelsAnOverdueGame() public {
        uint256 game = open(2, 2, 1);
        bet(game, 0, 1, 10 * TOKEN);
        vm.prank(accountOf(0));
        vm.expectRevert(PredictionMarket.GameNotOver.selector);
        market.claimReward(game, idOf(0));
        vm.warp(block.timestamp + market.JUDGE_SECONDS() + 1);
        vm.expectRevert(PredictionMarket.DeadlinePassed.selector);
        vm.prank(accountOf(1));
        market.guessAnswer(game, idOf(1), 0, 1, TOKEN);
        vm.assertEq(claim(game, 0), 10 * TOKEN);
        vm.assertTrue(market.gameStatus(game) == PredictionMarket.Status.Cancelled);
    }

    function test_onlyTheJudgeRunsGames() public {
        uint256 game = open(1, 2, 0);
        bytes memory refusal =
            abi.encodeWithSelector(OwnableUpgradeable.OwnableUnauthorizedAccount.selector, accountOf(0));
        vm.expectRevert(refusal);
        vm.prank(accountOf(0));
        market.createNewGame(1, 2, bytes32(0));
        vm.expectRevert(refusal);
        vm.prank(accountOf(0));
        market.incrementRound(game);
        close(game);
        vm.expectRevert(refusal);
        vm.prank(accountOf(0));
        market.revealAnswer(game, 0, SALT);
    }

    /// Neither the proxy, whose judge is set, nor the code behind it, which a caller could make its own.
    function test_initialisesOnce() public {
        PredictionMarket[2] memory initialised = [market, new PredictionMarket()];
        for (uint256 i = 0; i < initialised.length; i++) {
            vm.expectRevert(Initializable.InvalidInitialization.selector);
            vm.prank(accountOf(0));
            initialised[i].initialize(address(coordinator), accountOf(0));
        }
        vm.assertEq(market.owner(), address(this));
    }

    function test_onlyTheSwarmsOwnerUpgrades() public {
        address next = address(new PredictionMarket());
        market.transferOwnership(accountOf(0)); // another judge, which is not the swarm's owner
        vm.expectRevert(PredictionMarket.NotAllowed.selector);
        vm.prank(accountOf(0));
        market.upgradeToAndCall(next, "");
        market.upgradeToAndCall(next, "");
    }

    function test_gamesHaveSensibleCounts() public {
        uint256[2][4] memory wrong = [[uint256(0), 2], [uint256(65), 2], [uint256(1), 1], [uint256(1), 65]];
        for (uint256 i = 0; i < wrong.length; i++) {
            vm.expectRevert(PredictionMarket.InvalidCounts.selector);
            market.createNewGame(wrong[i][0], wrong[i][1], bytes32(0));
        }
        vm.expectRevert(PredictionMarket.UnknownGame.selector);
        market.gameStatus(0);
    }
}
