"""Rate-limit log lines that remote peers can trigger, per peer and in total.

Peer ids are free, so a peer could otherwise flood the log.
"""

import logging
import time
from collections.abc import Hashable

from cachetools import LRUCache

log = logging.getLogger(__name__)

SAY_AGAIN_SECONDS = 600.0
MAX_REMEMBERED = 1024
MAX_SAID_A_MINUTE = 20


class Lately:
    """The events that were logged in the last SAY_AGAIN_SECONDS."""

    def __init__(self) -> None:
        self._said: LRUCache[Hashable, float] = LRUCache(MAX_REMEMBERED)

    def has(self, what: Hashable) -> bool:
        """Return whether the event was logged lately; if not, record it as logged now."""
        now = time.monotonic()
        if now - self._said.get(what, -SAY_AGAIN_SECONDS) < SAY_AGAIN_SECONDS:
            return True
        self._said[what] = now
        return False


class Rarely(Lately):
    """Like Lately, with at most MAX_SAID_A_MINUTE new events in a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._minute_ends = 0.0
        self._num_said = 0

    def has(self, what: Hashable) -> bool:
        """Return whether to leave the event out; if not, record it as logged now."""
        return super().has(what) or not self.may()

    def may(self) -> bool:
        """Return whether there is room for one more event in this minute; if so, count it."""
        now = time.monotonic()
        if now >= self._minute_ends:
            self._minute_ends, self._num_said = now + 60, 0
        self._num_said += 1
        if self._num_said == MAX_SAID_A_MINUTE + 1:
            log.warning(
                "further messages about peers are omitted for up to a minute; the counters in"
                " `hivewright status` are complete"
            )
        return self._num_said <= MAX_SAID_A_MINUTE
