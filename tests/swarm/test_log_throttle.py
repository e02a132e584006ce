"""Log lines that remote peers can trigger are limited, per event and in total."""

import logging

import pytest

from worker.swarm import log_throttle
from worker.swarm.log_throttle import (
    LOG_AGAIN_SECONDS,
    MAX_LOGGED_PER_MINUTE,
    MAX_REMEMBERED,
    LogThrottle,
    RecentEvents,
)


class Clock:
    """A clock that only a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(log_throttle.time, "monotonic", clock.monotonic)
    return clock


def test_same_event_is_logged_again_only_after_a_while(clock: Clock) -> None:
    recent = RecentEvents()
    assert [recent.has(("peer", "flood")) for _ in range(3)] == [False, True, True]
    assert not recent.has(("other", "flood"))
    clock.now += LOG_AGAIN_SECONDS - 1
    assert recent.has(("peer", "flood"))
    clock.now += 1
    assert not recent.has(("peer", "flood"))


def test_events_that_are_remembered_are_limited_and_the_oldest_go_first(clock: Clock) -> None:
    recent = RecentEvents()
    for i in range(MAX_REMEMBERED + 1):
        recent.has(i)
    assert recent.has(MAX_REMEMBERED)
    assert recent.has(1)
    assert not recent.has(0)  # forgotten, so it is new


def test_many_events_in_a_minute_are_cut_off_with_one_line(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    throttle = LogThrottle()
    omitted = [throttle.has(("peer", i)) for i in range(3 * MAX_LOGGED_PER_MINUTE)]
    assert omitted == [False] * MAX_LOGGED_PER_MINUTE + [True] * (2 * MAX_LOGGED_PER_MINUTE)
    (line,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "further messages about peers are omitted" in line.getMessage()
    clock.now += 60
    assert not throttle.has(("peer", "the next minute"))


def test_repeated_events_do_not_use_up_the_minute(clock: Clock) -> None:
    throttle = LogThrottle()
    throttle.has("again")
    assert all(throttle.has("again") for _ in range(3 * MAX_LOGGED_PER_MINUTE))
    assert not throttle.has("another")
