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
