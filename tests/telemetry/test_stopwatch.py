"""The seconds of a node's activities add up to the time that passed."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.telemetry.stopwatch import Activity, Stopwatch


def test_each_second_belongs_to_one_activity() -> None:
    now = [10.0]
    watch = Stopwatch(lambda: now[0])
    watch.begin("generating")
    now[0] += 3
    watch.begin("exchanging")
    now[0] += 2
    watch.move(1.5, "exchanging", "waiting")
    watch.begin("training")
    now[0] += 1
    assert watch.take() == {"waiting": 1.5, "generating": 3, "exchanging": 0.5, "training": 1}
    now[0] += 4
    assert watch.take() == {"training": 4}


STEPS = st.lists(st.tuples(st.sampled_from(get_args(Activity)), st.integers(0, 100)))


@given(STEPS, st.sets(st.integers(0, 20)))
def test_all_seconds_are_counted_however_often_they_are_taken(
    steps: list[tuple[Activity, int]], taken_after: set[int]
) -> None:
    now, total = [0.0], {}
    watch = Stopwatch(lambda: now[0])
    expected: dict[str, float] = {}
    current = "waiting"
    for number, (activity, seconds) in enumerate(steps):
        now[0] += seconds
        expected[current] = expected.get(current, 0.0) + seconds
        watch.begin(activity)
        current = activity
        if number in taken_after:
            for name, value in watch.take().items():
                total[name] = total.get(name, 0.0) + value
    for name, value in watch.take().items():
        total[name] = total.get(name, 0.0) + value
    assert {name: value for name, value in total.items() if value} == {
        name: value for name, value in expected.items() if value
    }


def test_moved_seconds_change_no_sum() -> None:
    now = [0.0]
    watch = Stopwatch(lambda: now[0])
    watch.begin("exchanging")
    now[0] += 5
    watch.move(2, "exchanging", "waiting")
    watch.move(0, "exchanging", "training")
    taken = watch.take()
    assert sum(taken.values()) == pytest.approx(5)
    assert (taken["exchanging"], taken["waiting"]) == (3, 2)
