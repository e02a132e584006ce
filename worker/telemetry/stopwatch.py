"""Measure the seconds that a node spends on each of its activities."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Literal

Activity = Literal[
    "generating", "scoring", "exchanging", "training", "saving", "evaluating", "waiting"
]
"""`exchanging`: publishing groups and collecting those of peers; `waiting`: waiting for peers and
for the next round."""


class Stopwatch:
    """Measures one activity at a time; `clock` is monotonic seconds."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._activity: Activity = "waiting"
        self._since = clock()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def begin(self, activity: Activity) -> None:
        """End the current activity and begin this one."""
        now = self._clock()
        self._seconds[self._activity] += now - self._since
        self._activity, self._since = activity, now

    def move(
        self,
        seconds: float,
        source: Activity,
        target: Activity,
    ) -> None:
        """Count seconds of the activity `source` as those of `target`."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def take(self) -> dict[str, float]:
        """Return the seconds of each activity since the last call."""
        self.begin(self._activity)
        taken, self._seconds = self._seconds, defaultdict(float)
        return {activity: round(seconds, 3) for activity, seconds in taken.items()}
