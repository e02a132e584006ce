// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// Members with a score that only ever grows by one, kept in descending order of score.
///
/// Raising a score costs the same whatever the number of members: the member changes places with the first of those
/// that have the same score, and is then the last of those that have one more. So a page of a leaderboard is read
/// without sorting anything.
library Ranking {
    struct Standing {
        uint128 score;
        uint128 place; // index in `order`
    }

    struct List {
        uint256[] order; // members, best first
        mapping(uint256 member => Standing) standings;
        mapping(uint256 score => uint256) first; // first place with this score; stale where nobody has the score
    }

    /// Adds one to `member`'s score; a member that is not in the list enters it with a score of 1.
    function raise(List storage list, uint256 member) internal {
        Standing storage standing = list.standings[member];
        uint256 place = standing.place;
        uint256 score = standing.score;
        if (score == 0) {
            place = list.order.length;
            list.order.push(member);
        } else {
            uint256 head = list.first[score];
            if (head != place) {
                uint256 other = list.order[head];
                list.order[place] = other;
                list.order[head] = member;
                list.standings[other].place = uint128(place);
                place = head;
            }
            list.first[score] = head + 1;
        }
        standing.score = uint128(score + 1);
        standing.place = uint128(place);
        if (place == 0 || scoreOf(list, list.order[place - 1]) != score + 1) list.first[score + 1] = place;
    }

    function scoreOf(List storage list, uint256 member) internal view returns (uint256) {
        return list.standings[member].score;
    }

    /// The members on places `start` to `end` (not included), cut to those that exist.
    function page(List storage list, uint256 start, uint256 end) internal view returns (uint256[] memory members) {
        if (end > list.order.length) end = list.order.length;
        if (start > end) start = end;
        members = new uint256[](end - start);
        for (uint256 i = 0; i < members.length; i++) members[i] = list.order[start + i];
    }
}
