from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.groups import scored_group
from worker.records import Task
from worker.trainer import lesson

TEXTS = ("a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh")


def group(*rewards):
    return scored_group(Task("gcd", "0" * 12, 1, 0), "?", TEXTS[: len(rewards)], rewards)


def most_different(groups, most):
    """Choose from groups of which no completion is left out for another reason."""
    return lesson.most_different(groups, [range(len(g.rollouts)) for g in groups], most)


def test_a_small_batch_keeps_all_completions():
    assert most_different([group(0, 1), group(0, 0, 1)], 5) == [{0, 1}, {0, 1, 2}]


def test_a_larger_batch_keeps_the_best_and_the_worst_of_each_group():
    groups = [group(0.1, 0.9, 0.5, 0.4, 1.0, 0.0, 0.6, 0.3), group(1, 1, 1, 0)]
    assert most_different(groups, 8) == [{1, 4, 5, 0}, {0, 1, 2, 3}]


def test_among_equal_rewards_the_shorter_completions_are_kept():
    assert most_different([group(0, 0, 0, 0, 0, 0, 0, 1)] * 2, 8) == [{7, 0, 1, 2}] * 2


def test_each_group_keeps_at_least_two():
    kept = most_different([group(0, 0, 1, 1)] * 10, 2)
    assert kept == [{0, 2}] * 10


@hypothesis_settings(max_examples=60, deadline=None, database=None)
@given(
    rewards=st.lists(
        st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=2, max_size=8),
        min_size=1,
        max_size=4,
    ),
    most=st.integers(2, 40),
)
def test_kept_completions_have_the_highest_and_lowest_rewards(
    rewards: list[list[float]], most: int
) -> None:
    kept = most_different([group(*each) for each in rewards], most)
    if sum(map(len, rewards)) <= most:
        assert kept == [set(range(len(each))) for each in rewards]
        return
    size = max(map(len, kept))
    assert size == 2 or sum(map(len, kept)) <= most
    for positions, each in zip(kept, rewards, strict=True):
        assert len(positions) == min(size, len(each))
        chosen = sorted(each[position] for position in positions)
        num_high = len(chosen) - len(chosen) // 2
        in_order = sorted(each)
        assert chosen[len(chosen) - num_high :] == in_order[len(each) - num_high :]
        assert chosen[: len(chosen) - num_high] == in_order[: len(chosen) - num_high]


def test_among_equal_rewards_the_credit_decides():
    texts, rewards = TEXTS[:4], (0.0,) * 4
    task = Task("gcd", "0" * 12, 1, 0)
    one = scored_group(task, "?", texts, rewards, credits=(0.0, 0.5, 0.0, 0.1))
    assert most_different([one, one], 4) == [{1, 0}] * 2


def test_no_groups_have_nothing_to_keep():
    assert most_different([], 2) == []


def test_completions_that_are_left_out_anyway_take_no_place():
    rare, even = group(0, 0, 0, 0, 0, 0, 0, 1), group(0, 0, 0, 0, 1, 1, 1, 1)
    usable = [range(8), [7], range(4, 8)]
    assert lesson.most_different([even, rare, even], usable, 13) == [
        frozenset(range(8)),
        {7},
        {4, 5, 6, 7},
    ]
    assert lesson.most_different([even, rare, even], usable, 8) == [{4, 5, 0}, {7}, {4, 5, 6}]


def test_places_that_small_groups_leave_are_used_by_the_others():
    groups = [group(0, 0, 0, 0, 1, 1, 1, 1)] * 2 + [group(0, 1)] * 2
    assert [len(kept) for kept in most_different(groups, 16)] == [6, 6, 2, 2]
