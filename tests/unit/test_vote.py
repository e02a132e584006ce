"""The vote for the best peer of a round, from rewards that were verified here."""

from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.groups import scored_group
from worker.records import ScoredGroup, Task, milli_reward
from worker.vote import winners

TASK = Task("sum", "x", 1, 0)


def group(peer: str | None, *rewards: float) -> ScoredGroup:
    return scored_group(TASK, "?", ("",) * len(rewards), rewards, peer_id=peer)


def test_vote_goes_to_the_highest_mean_of_verified_rewards():
    external = [
        group("a", 1.0, 1.0),
        group("a", 0.0, 0.0),
        group("b", 0.5, 0.75),
        group("c", 0.5, 0.5),
    ]
    assert winners("me", [group(None, 0.25, 0.25)], external) == ["b"]


def test_nobody_was_seen_so_nobody_gets_the_vote():
    assert winners("me", [group(None, 1.0, 1.0)], []) == []


def test_own_vote_only_for_more_than_all_that_were_seen():
    external = [group("a", 0.5, 0.5), group("b", 0.25, 0.25)]
    assert winners("me", [group(None, 0.5, 0.5)], external) == ["a"]
    assert winners("me", [group(None, 0.5, 0.75)], external) == ["me"]
    assert winners("me", [], external) == ["a"]


def test_milli_reward_is_the_rounded_mean():
    assert milli_reward([1.0, 0.5, 0.25]) == 583
    assert milli_reward([]) == 0


REWARDS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=2)
HEARD = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), REWARDS), max_size=6)


@given(HEARD, st.lists(REWARDS, max_size=3))
def test_nobody_else_has_more_than_the_winner(heard, own):
    vote = winners(
        "me",
        [group(None, *rewards) for rewards in own],
        [group(peer, *rewards) for peer, rewards in heard],
    )
    means = {
        peer: fmean(fmean(rewards) for name, rewards in heard if name == peer) for peer, _ in heard
    }
    if not heard:
        assert vote == []
        return
    ours = fmean(fmean(rewards) for rewards in own) if own else -1.0
    (winner,) = vote
    if winner == "me":
        assert ours > max(means.values())
    else:
        assert means[winner] == pytest.approx(max(means.values()))
        assert ours <= means[winner] + 1e-12


def test_order_of_groups_decides_no_tie():
    external = [group("a", 0.5, 0.5), group("b", 0.5, 0.5)]
    assert winners("me", [], external) == winners("me", [], external[::-1]) == ["b"]


def test_groups_without_a_peer_are_nobodys():
    assert winners("me", [], [group(None, 1.0, 1.0)]) == []
