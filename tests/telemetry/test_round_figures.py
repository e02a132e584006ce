"""Figures of a round by family and level."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


REWARDS = st.lists(st.floats(0, 1) | st.just(math.nan), min_size=1, max_size=4)
NAMED = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["0", "1", "none"]), REWARDS))


@given(NAMED)
def test_figures_are_those_of_all_finite_groups(named):
    levels = {"0": 0, "1": 1, "none": None}
    groups = [group(family, digest, rewards) for family, digest, rewards in named]
    found = by_family(groups, lambda task: levels[task.config_digest])
    expected = {}
    for family, digest, rewards in named:
        if all(map(math.isfinite, rewards)):
            expected.setdefault((family, levels[digest]), []).append(rewards)
    assert {(each.family, each.level) for each in found} == set(expected)
    for each in found:
        rewards = [value for row in expected[each.family, each.level] for value in row]
        rows = expected[each.family, each.level]
        assert each.groups == len(rows)
        assert each.reward == pytest.approx(statistics.fmean(rewards))
        spread = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
        assert each.reward_std == pytest.approx(spread)
        flat = sum(max(row) == min(row) for row in rows)
        assert each.frac_reward_zero_std == pytest.approx(flat / len(rows))
    assert [(e.family, e.level is not None, e.level or 0) for e in found] == sorted(
        (e.family, e.level is not None, e.level or 0) for e in found
    )
