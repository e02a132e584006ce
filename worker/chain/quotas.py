"""Rate limits: a token bucket for each caller."""

import time

from cachetools import LRUCache

_MOST_CALLERS = 10_000


class Quota:
    """Allow each caller a burst of `burst`, then `per_second`. Not thread-safe.

    Of more than 10,000 callers, those that were silent longest are dropped, and begin again with a
    full bucket.
    """

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second = per_second
        self._burst = burst
        self._buckets: LRUCache[str, tuple[float, float]] = LRUCache(_MOST_CALLERS)

    def take(
        self,
        caller: str,
        count: float = 1.0,
    ) -> bool:
        """Take `count` from the caller's bucket; return False, and take nothing, if it has less."""
        left = self.left(caller)
        if left < count:
            return False
        self._buckets[caller] = (time.monotonic(), left - count)
        return True

    def left(self, caller: str) -> float:
        """Return the caller's remaining tokens."""
        now = time.monotonic()
        filled_at, left = self._buckets.get(caller, (now, self._burst))
        refilled = (now - filled_at) * self._per_second
        return min(self._burst, left + refilled)
