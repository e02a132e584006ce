"""Rate limits: a bucket for each caller that refills with time."""

import time

from cachetools import LRUCache

_MOST_CALLERS = 10_000


class Quota:
    """`burst` at once and `per_second` from then on, for each caller. Not for several threads.

    Of more than 10,000 callers those that have been silent longest are forgotten: they begin with a
    full bucket again.
    """

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second = per_second
        self._burst = burst
        self._buckets: LRUCache[str, tuple[float, float]] = LRUCache(_MOST_CALLERS)

    def take(self, caller: str, count: float = 1.0) -> bool:
        """Take `count` out of the caller's bucket. Returns False, and takes nothing, if there is
        less in it."""
        left = self.left(caller)
        if left < count:
            return False
        self._buckets[caller] = (time.monotonic(), left - count)
        return True

    def left(self, caller: str) -> float:
        """Return what is in the caller's bucket now."""
        now = time.monotonic()
        filled_at, left = self._buckets.get(caller, (now, self._burst))
        return min(self._burst, left + (now - filled_at) * self._per_second)
