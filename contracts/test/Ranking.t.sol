// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Ranking} from "../src/Ranking.sol";
import {vm} from "./Fixture.sol";

/// The list against a plain count, for any order of raises.
contract RankingTest {
    using Ranking for Ranking.List;

    Ranking.List private _list;

    function testFuzz_listAgreesWithACount(uint8[] calldata raises) public {
        uint256[12] memory scores;
        for (uint256 i = 0; i < raises.length; i++) {
            uint256 member = raises[i] % 12;
            scores[member]++;
            _list.raise(member);
        }
        uint256[] memory order = _list.page(0, type(uint256).max);
        uint256 members;
        for (uint256 member = 0; member < 12; member++) {
            vm.assertEq(_list.scoreOf(member), scores[member]);
            if (scores[member] > 0) members++;
        }
        vm.assertEq(order.length, members);
        bool[12] memory seen;
        for (uint256 i = 0; i < order.length; i++) {
            vm.assertTrue(i == 0 || scores[order[i - 1]] >= scores[order[i]], "not in descending order");
            vm.assertTrue(scores[order[i]] > 0, "listed without a score");
            vm.assertFalse(seen[order[i]]);
            seen[order[i]] = true;
        }
    }

    function testFuzz_pageIsCutToWhatIsThere(uint256 start, uint256 end, uint8 members) public {
        for (uint256 member = 0; member < members; member++) _list.raise(member);
        uint256 last = end < members ? end : members;
        uint256[] memory page = _list.page(start, end);
        vm.assertEq(page.length, start < last ? last - start : 0);
        for (uint256 i = 0; i < page.length; i++) vm.assertEq(page[i], _list.order[start + i]);
    }
}
