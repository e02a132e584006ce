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
    """The things that were logged in the last SAY_AGAIN_SECONDS."""

    def __init__(self) -> None:
        self._said: LRUCache[Hashable, float] = LRUCache(MAX_REMEMBERED)

    def has(self, what: Hashable) -> bool:
        """Return whether it was logged lately; if not, it is now."""
        now = time.monotonic()
        if now - self._said.get(what, -SAY_AGAIN_SECONDS) < SAY_AGAIN_SECONDS:
            return True
        self._said[what] = now
        return False


class Rarely(Lately):
    """Lately, and no more than MAX_SAID_A_MINUTE new things in a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._minute_ends = 0.0
        self._num_said = 0

    def has(self, what: Hashable) -> bool:
        """Return whether it was logged lately, or is to be left out; if not, it is logged now."""
        return super().has(what) or not self.may()

    def may(self) -> bool:
        """Return whether there is room for one more thing in this minute; if so, it is logged
        now."""
        now = time.monotonic()
        if now >= self._minute_ends:
            self._minute_ends, self._num_said = now + 60, 0
        self._num_said += 1
        if self._num_said == MAX_SAID_A_MINUTE + 1:
            log.warning(
                "more about peers is left out for up to a minute; the counters in `hivewright"
                " status` go on"
            )
        return self._num_said <= MAX_SAID_A_MINUTE
