"""Rate-limit log lines that remote peers can trigger, per peer and in total.

Peer ids are free, so a peer could otherwise flood the log.
"""

import logging
import time
from collections.abc import Hashable

from cachetools import LRUCache

log = logging.getLogger(__name__)

LOG_AGAIN_SECONDS = 600.0
MAX_REMEMBERED = 1024
MAX_LOGGED_PER_MINUTE = 20


class RecentEvents:
    """The events that were logged in the last LOG_AGAIN_SECONDS."""

    def __init__(self) -> None:
        self._logged_at: LRUCache[Hashable, float] = LRUCache(MAX_REMEMBERED)

    def has(self, what: Hashable) -> bool:
        """Return whether the event was logged recently; if not, record it as logged now."""
        now = time.monotonic()
        if now - self._logged_at.get(what, -LOG_AGAIN_SECONDS) < LOG_AGAIN_SECONDS:
            return True
        self._logged_at[what] = now
        return False


class LogThrottle(RecentEvents):
    """Like RecentEvents, with at most MAX_LOGGED_PER_MINUTE new events in a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._minute_ends = 0.0
        self._num_logged = 0

    def has(self, what: Hashable) -> bool:
        """Return whether to leave the event out; if not, record it as logged now."""
        return super().has(what) or not self.may()

    def may(self) -> bool:
        """Return whether there is room for one more event in this minute; if so, count it."""
        now = time.monotonic()
        if now >= self._minute_ends:
            self._minute_ends, self._num_logged = now + 60, 0
        self._num_logged += 1
        if self._num_logged == MAX_LOGGED_PER_MINUTE + 1:
            log.warning(
                "further messages about peers are omitted for up to a minute; the counters in"
                " `hivewright status` are complete"
            )
        return self._num_logged <= MAX_LOGGED_PER_MINUTE
