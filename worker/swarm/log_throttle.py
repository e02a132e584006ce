"""What strangers do is said once in a while for each of them, and all of it together only so often a minute: keys cost
nothing, and a log that they fill tells nothing."""

import logging
import time
from collections.abc import Hashable

log = logging.getLogger(__name__)

SAY_AGAIN_SECONDS = 600.0
MAX_REMEMBERED = 1024
MAX_SAID_A_MINUTE = 20


class Lately:
    """What was said in the last SAY_AGAIN_SECONDS: strangers must not be able to fill the log."""

    def __init__(self) -> None:
        self._said: dict[Hashable, float] = {}

    def has(self, what: Hashable) -> bool:
        """Whether it was said lately; if not, it is now."""
        now = time.monotonic()
        if now - self._said.get(what, -SAY_AGAIN_SECONDS) < SAY_AGAIN_SECONDS:
            return True
        self._said.pop(what, None)
        self._said[what] = now
        while len(self._said) > MAX_REMEMBERED:
            del self._said[next(iter(self._said))]
        return False


class Rarely(Lately):
    """Lately, and no more than MAX_SAID_A_MINUTE new things in a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._minute_ends = 0.0
        self._num_said = 0

    def has(self, what: Hashable) -> bool:
        """Whether it was said lately, or is to be left out; if not, it is said now."""
        return super().has(what) or not self.may()

    def may(self) -> bool:
        """Whether there is room for one more thing in this minute; if so, it is said now."""
        now = time.monotonic()
        if now >= self._minute_ends:
            self._minute_ends, self._num_said = now + 60, 0
        self._num_said += 1
        if self._num_said == MAX_SAID_A_MINUTE + 1:
            log.warning("more about peers is left out for up to a minute; the counters in `hivewright status` go on")
        return self._num_said <= MAX_SAID_A_MINUTE
