// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ERC1967Proxy} from "@openzeppelin/contracts/proxy/ERC1967/ERC1967Proxy.sol";
import {PredictionMarket} from "../src/PredictionMarket.sol";
import {Fixture, vm} from "./Fixture.sol";

/// A market whose judge is the test, and peers with an account each.
abstract contract MarketFixture is Fixture {
    uint256 internal constant NUM_PEERS = 4;
    uint256 internal constant TOKEN = 1e18;
    uint256 internal constant SALT = uint256(keccak256("secret"));

    PredictionMarket internal market;

    function setUp() public virtual override {
        super.setUp();
        vm.warp(1_000_000);
        bytes memory initialise = abi.encodeCall(PredictionMarket.initialize, (address(coordinator), address(this)));
        market = PredictionMarket(address(new ERC1967Proxy(address(new PredictionMarket()), initialise)));
        for (uint256 peer = 0; peer < NUM_PEERS; peer++) register(accountOf(peer), idOf(peer));
    }

    function idOf(uint256 peer) internal pure returns (string memory) {
        return string.concat("peer-", vm.toString(peer));
    }

    function accountOf(uint256 peer) internal pure returns (address) {
        return vm.addr(peer + 1);
    }

    function open(uint256 rounds, uint256 choices, uint256 right) internal returns (uint256) {
        return market.createNewGame(rounds, choices, market.commitmentOf(right, SALT));
    }

    function bet(uint256 game, uint256 peer, uint256 choice, uint256 tokens) internal returns (uint256 shares) {
        uint256 round = market.currentRoundIdx(game);
        shares = market.choiceTokensOut(game, round, choice, tokens);
        vm.prank(accountOf(peer));
        market.guessAnswer(game, idOf(peer), round, choice, tokens);
    }

    function close(uint256 game) internal {
        while (market.gameStatus(game) == PredictionMarket.Status.Open) market.incrementRound(game);
    }

    /// Returns the tokens that the peer got; a game that has nothing for it pays 0.
    function claim(uint256 game, uint256 peer) internal returns (uint256) {
        uint256 before = market.betTokenBalance(idOf(peer));
        vm.prank(accountOf(peer));
        try market.claimReward(game, idOf(peer)) {
            return market.betTokenBalance(idOf(peer)) - before;
        } catch (bytes memory reason) {
            vm.assertTrue(bytes4(reason) == PredictionMarket.NothingToClaim.selector, "a claim was refused");
            return 0;
        }
    }
}
