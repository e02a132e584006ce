// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {PredictionMarket} from "../src/PredictionMarket.sol";
import {MarketFixture} from "./MarketFixture.sol";
import {vm} from "./Fixture.sol";

/// Games in which everybody does anything in any order, and a second book of the money.
contract Gamblers is MarketFixture {
    mapping(uint256 game => uint256) public put;
    mapping(uint256 game => uint256) public paid;
    mapping(uint256 game => mapping(uint256 peer => uint256)) public claims;
    mapping(uint256 game => uint256) public rightOf;

    constructor() {
        setUp();
    }

    function theMarket() external view returns (PredictionMarket) {
        return market;
    }

    function openGame(uint256 rounds, uint256 choices, uint256 right) external {
        (rounds, choices) = (1 + rounds % 3, 2 + choices % 4);
        rightOf[open(rounds, choices, right % choices)] = right % choices;
    }

    function guess(uint256 game, uint256 peer, uint256 choice, uint256 tokens) external {
        if (market.gameCount() == 0) return;
        (game, peer) = (game % market.gameCount(), peer % NUM_PEERS);
        (tokens, choice) = (tokens % (40 * TOKEN), choice % market.choiceCount(game));
        uint256 round = market.currentRoundIdx(game);
        vm.prank(accountOf(peer));
        try market.guessAnswer(game, idOf(peer), round, choice, tokens) {
            put[game] += tokens;
        } catch {}
    }

    function endRound(uint256 game) external {
        if (market.gameCount() == 0) return;
        try market.incrementRound(game % market.gameCount()) {} catch {}
    }

    function reveal(uint256 game) external {
        if (market.gameCount() == 0) return;
        game %= market.gameCount();
        try market.revealAnswer(game, rightOf[game], SALT) {} catch {}
    }

    function wait(uint256 time) external {
        vm.warp(block.timestamp + time % 1 days);
    }

    function take(uint256 game, uint256 peer) external {
        if (market.gameCount() == 0) return;
        (game, peer) = (game % market.gameCount(), peer % NUM_PEERS);
        uint256 before = market.betTokenBalance(idOf(peer));
        vm.prank(accountOf(peer));
        try market.claimReward(game, idOf(peer)) {
            paid[game] += market.betTokenBalance(idOf(peer)) - before;
            claims[game][peer]++;
        } catch {}
    }

    /// What the peers can still claim from a game.
    function owed(uint256 game) external view returns (uint256 sum) {
        for (uint256 peer = 0; peer < NUM_PEERS; peer++) {
            (uint256 payout, bool claimed) = market.getPayout(game, idOf(peer));
            if (!claimed) sum += payout;
        }
    }

    function peers() external pure returns (uint256) {
        return NUM_PEERS;
    }
}

contract MarketInvariantsTest {
    Gamblers private _gamblers;

    function setUp() public {
        _gamblers = new Gamblers();
    }

    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(_gamblers);
    }

    struct FuzzSelector {
        address addr;
        bytes4[] selectors;
    }

    function targetSelectors() public view returns (FuzzSelector[] memory targets) {
        bytes4[] memory selectors = new bytes4[](6);
        selectors[0] = Gamblers.openGame.selector;
        selectors[1] = Gamblers.guess.selector;
        selectors[2] = Gamblers.endRound.selector;
        selectors[3] = Gamblers.reveal.selector;
        selectors[4] = Gamblers.wait.selector;
        selectors[5] = Gamblers.take.selector;
        targets = new FuzzSelector[](1);
        targets[0] = FuzzSelector(address(_gamblers), selectors);
    }

    function invariant_gameNeverPaysMoreThanWasPutIn() public view {
        PredictionMarket market = _gamblers.theMarket();
        for (uint256 game = 0; game < market.gameCount(); game++) {
            vm.assertEq(market.totalBets(game), _gamblers.put(game));
            uint256 all = _gamblers.paid(game) + _gamblers.owed(game);
            vm.assertTrue(all <= _gamblers.put(game), "more is owed than was put in");
            PredictionMarket.Status status = market.gameStatus(game);
            bool over = status == PredictionMarket.Status.Settled || status == PredictionMarket.Status.Cancelled;
            if (over) vm.assertTrue(_gamblers.put(game) < all + 4, "money is missing");
        }
    }

    function invariant_claimsArePaidOnce() public view {
        PredictionMarket market = _gamblers.theMarket();
        for (uint256 game = 0; game < market.gameCount(); game++) {
            for (uint256 peer = 0; peer < _gamblers.peers(); peer++) {
                vm.assertTrue(_gamblers.claims(game, peer) <= 1, "paid twice");
            }
        }
    }
}
