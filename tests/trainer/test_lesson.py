from tests.groups import scored_group
from worker.records import Task
from worker.trainer.lesson import most_different

TEXTS = ("a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh")


def group(*rewards):
    return scored_group(Task("gcd", "0" * 12, 1, 0), "?", TEXTS[: len(rewards)], rewards)


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
