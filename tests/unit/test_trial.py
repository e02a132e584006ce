"""Comparing weights on the same tasks: those that both answered count."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import trial
from worker.evaluation import Estimate, Score
from worker.trial import MIN_TASKS, QUANTILE, common_means, estimate, pair_up, rewards_of

REWARDS = st.dictionaries(
    st.tuples(st.sampled_from("abc"), st.none() | st.integers(0, 1)),
    st.lists(st.floats(0, 1), max_size=20).map(tuple),
)


def test_rewards_are_by_family_and_level():
    value = Estimate(0.5, 0.0, 1.0)
    scores = [
        Score("gcd", level, 2, 8, value, {1: value}, 1.0, 0.0, rewards=rewards)
        for level, rewards in ((0, (0.0, 1.0)), (2, (0.5,)), (None, ()))
    ]
    assert rewards_of(scores) == {
        ("gcd", 0): (0.0, 1.0),
        ("gcd", 2): (0.5,),
        ("gcd", None): (),
    }


def test_families_count_equally_however_many_tasks_they_have():
    ours = {("a", 0): (1.0,) * 30, ("b", 0): (0.0,)}
    theirs = {("a", 0): (0.0,) * 30, ("b", 0): (1.0,)}
    assert common_means([ours, theirs]) == [0.5, 0.5]


def test_only_tasks_that_all_have_answered_count():
    ours = {("a", 0): (1.0, 0.0, 0.0), ("b", 0): (0.0,)}
    theirs = {("a", 0): (1.0,)}
    assert common_means([ours, theirs]) == [1.0, 1.0]
    assert common_means([theirs, ours]) == [1.0, 1.0]


@pytest.mark.parametrize("candidates", [[], [{}], [{}, {("a", 0): (1.0,)}], [{("a", 0): ()}] * 2])
def test_nothing_in_common_is_not_a_number(candidates):
    means = common_means(candidates)
    assert len(means) == len(candidates)
    assert all(map(math.isnan, means))


@given(st.lists(REWARDS, min_size=1, max_size=3))
def test_common_means_are_those_of_a_plain_computation(candidates):
    common = set.intersection(*(set(each) for each in candidates))
    values = [[] for _ in candidates]
    for one in common:
        count = min(len(each[one]) for each in candidates)
        for found, each in zip(values, candidates, strict=True):
            if count:
                found.append(statistics.fmean(each[one][:count]))
    for found, mean in zip(values, common_means(candidates), strict=True):
        assert mean == (
            pytest.approx(statistics.fmean(found))
            if found
            else pytest.approx(math.nan, nan_ok=True)
        )


@given(REWARDS, REWARDS)
def test_difference_is_that_of_the_pairs(ours, theirs):
    pairs = [
        their - our
        for one in ours
        if one in theirs
        for our, their in zip(ours[one], theirs[one], strict=False)
    ]
    found = estimate(pair_up(ours, theirs))
    assert found.value == pytest.approx(statistics.fmean(pairs) if pairs else 0.0)
    if len(pairs) < MIN_TASKS:
        assert (found.low, found.high) == (-math.inf, math.inf)
    else:
        half = QUANTILE * statistics.stdev(pairs) / math.sqrt(len(pairs))
        assert found.low == pytest.approx(found.value - half)
        assert found.high == pytest.approx(found.value + half)


@given(REWARDS)
def test_weights_are_never_better_than_themselves(ours):
    found = estimate(pair_up(ours, ours))
    assert found.value == 0
    assert found.low <= 0


@pytest.mark.parametrize(("count", "is_known"), [(MIN_TASKS - 1, False), (MIN_TASKS, True)])
def test_few_tasks_are_never_beyond_noise(count, is_known):
    found = estimate([1.0] * count)
    assert (found.low > 0) == is_known
    assert found.value == 1.0


class Families:
    """An environment of three families, two with a curriculum."""

    names = ("gcd", "sums", "code")

    def __init__(self):
        self.levels = {"gcd": 3, "sums": 0}

    def tasks_of(self, family, level, seed, count):
        return [(family, level, seed, index) for index in range(count)]


@pytest.mark.parametrize(
    ("levels", "asked"),
    [
        ({}, [("gcd", 0), ("sums", 0), ("code", None)]),
        ({"gcd": 2}, [("gcd", 0), ("gcd", 2), ("sums", 0), ("code", None)]),
        ({"gcd": 0, "sums": 1}, [("gcd", 0), ("sums", 0), ("sums", 1), ("code", None)]),
        ({"code": 4, "unknown": 1}, [("gcd", 0), ("sums", 0), ("code", None)]),
    ],
)
def test_each_family_is_asked_at_its_first_level_and_at_the_one_reached(levels, asked):
    assert trial.choose_tasks(Families(), levels) == asked


def test_digest_tells_tasks_apart():
    asked = [("gcd", 0), ("code", None)]
    first = trial.tasks_digest(Families(), asked, 4, 7)
    assert first == trial.tasks_digest(Families(), asked, 4, 7)
    others = [
        trial.tasks_digest(Families(), asked, 5, 7),
        trial.tasks_digest(Families(), asked, 4, 8),
        trial.tasks_digest(Families(), asked[:1], 4, 7),
        trial.tasks_digest(Families(), asked[::-1], 4, 7),
    ]
    assert len({first, *others}) == 5
