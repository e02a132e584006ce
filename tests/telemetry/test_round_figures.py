"""Figures of a round by family and level."""

import pytest

from tests.groups import scored_group
from worker.records import Task
from worker.telemetry.round_figures import by_family


def group(family, digest, rewards):
    task = Task(family, digest, 0, 0)
    return scored_group(task, "?", ("a",) * len(rewards), rewards)


def test_rewards_are_grouped_by_family_and_level():
    levels = {"easy": 0, "hard": 1, "plain": None}
    groups = [
        group("gcd", "hard", (0.0, 0.0)),
        group("bf", "plain", (1.0, 0.0)),
        group("gcd", "easy", (1.0, 0.0)),
        group("gcd", "easy", (1.0, 1.0)),
    ]
    bf, easy, hard = by_family(groups, lambda task: levels[task.config_digest])
    assert (bf.family, bf.level, bf.groups, bf.reward) == ("bf", None, 1, 0.5)
    assert (easy.family, easy.level, easy.groups, easy.reward) == ("gcd", 0, 2, 0.75)
    assert easy.reward_std == pytest.approx(0.5)
    assert easy.frac_reward_zero_std == 0.5
    assert (hard.level, hard.reward, hard.reward_std, hard.frac_reward_zero_std) == (1, 0, 0, 1)


def test_no_group_has_no_family():
    assert by_family([], lambda _: None) == ()
