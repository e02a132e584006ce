"""Token buckets: bursts, refill, and the bound on callers."""

import pytest

from worker.chain import quotas
from worker.chain.quotas import Quota


class Clock:
    """Stands in for `time.monotonic`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(quotas.time, "monotonic", lambda: self.now)


def test_burst_then_refill_for_each_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, quota = Clock(monkeypatch), Quota(per_second=2.0, burst=3.0)
    assert [quota.take("a") for _ in range(4)] == [True, True, True, False]
    assert quota.take("b")
    clock.now += 0.5
    assert quota.take("a")
    assert not quota.take("a")
    clock.now += 1000
    assert quota.left("a") == 3.0


def test_refused_take_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    quota = Quota(per_second=1.0, burst=5.0)
    assert not quota.take("a", 6)
    assert quota.take("a", 5)
    assert quota.left("a") == 0.0


def test_callers_silent_the_longest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    monkeypatch.setattr(quotas, "_MOST_CALLERS", 2)
    quota = Quota(per_second=0.0, burst=1.0)
    for caller in ("a", "b", "c"):
        assert quota.take(caller)
    assert (quota.left("a"), quota.left("b"), quota.left("c")) == (1.0, 0.0, 0.0)
