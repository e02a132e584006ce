"""The number of the current round, from the chain or, without a chain, counted locally."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from worker.errors import ChainUnreachable
from worker.runtime.outage import Outage

logger = logging.getLogger(__name__)

OPEN_FOR_LONG = 0.5
"""A further part begins at once if the last round stayed open this many parts after our first."""
PATIENCE = 0.25
"""Otherwise a node first waits for the next round for as long as this many parts take."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The round to train now."""

    round: int
    stage: int


class Clock(Protocol):
    """A source of round numbers."""

    def next(
        self,
        after: int,
        waiting: Callable[[], None],
        deadline: float | None = None,
    ) -> Tick | None:
        """Block until the round is later than `after`, calling `waiting` after each check.

        After `deadline` (time.monotonic) it returns the current round, which is `after` itself.
        Returns None if the round is unknown: the chain can't be reached, or is behind `after`
        because it was restored from an older state.
        """


class RoundSource(Protocol):
    """The part of chain.coordinator.Coordinator that a clock reads."""

    def current_round(self) -> int: ...
    def current_stage(self) -> int: ...


class ChainClock:
    """The chain's round, read every `poll_seconds`. Rounds that were missed stay untrained."""

    def __init__(self, coordinator: RoundSource, poll_seconds: float) -> None:
        self._coordinator = coordinator
        self._poll_seconds = poll_seconds
        self.reachable: bool | None = None
        self._outage = Outage(logger)
        self._is_behind = False

    def next(
        self,
        after: int,
        waiting: Callable[[], None],
        deadline: float | None = None,
    ) -> Tick | None:
        while True:
            try:
                current = Tick(self._coordinator.current_round(), self._coordinator.current_stage())
            except ChainUnreachable as error:
                self._outage.begin(
                    "chain unreachable, training continues without it error=%s", error
                )
                self.reachable = False
                return None
            self._outage.end("chain reachable again round=%d", current.round)
            self.reachable = True
            if current.round > after:
                self._is_behind = False
                return current
            waiting()
            if current.round < after:
                if not self._is_behind:
                    logger.warning(
                        "chain is behind, as after a restore; training continues without it until"
                        " it catches up round=%d last_trained=%d",
                        current.round,
                        after,
                    )
                self._is_behind = True
                return None
            left = math.inf if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return current
            time.sleep(min(self._poll_seconds, left))


class Pace:
    """Decides how long a node waits for the next round before it answers more tasks of this one.

    In a swarm of equally fast nodes the next round begins as soon as all have reported, and a node
    that has just begun a further part would be late for it. With a slow node, or with long rounds,
    the next round begins much later. So the node waits a little, unless the last round stayed open
    for long. `clock` returns monotonic seconds.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._reported_at = clock()  # when the first part of the current round ended
        self._part_seconds = 0.0
        self._open_seconds = 0.0  # of the current round after its first part, so far
        self._last_open_seconds = 0.0  # of the last round
        self._num_further_steps = 0  # of the current round, after its first part

    def finish(self, part: int, seconds: float) -> None:
        """Note the end of a step that began with `part` and took this many seconds."""
        self._part_seconds = seconds
        self._num_further_steps += 1
        if part == 0:
            self._num_further_steps = 0
            self._last_open_seconds, self._open_seconds = self._open_seconds, 0.0
            self._reported_at = self._clock()

    def see_open(self) -> None:
        """Note that the current round is still open."""
        self._open_seconds = self._clock() - self._reported_at

    def patience(self) -> float:
        """Return the seconds to wait for the next round before another step of this one begins."""
        stays_open = self._last_open_seconds >= OPEN_FOR_LONG * self._part_seconds
        return 0.0 if self._num_further_steps or stays_open else PATIENCE * self._part_seconds


class LocalClock:
    """The clock without a chain: each round begins when the last one has ended."""

    def next(
        self,
        after: int,
        waiting: Callable[[], None],
        deadline: float | None = None,
    ) -> Tick | None:
        waiting()
        return Tick(after + 1, 0)
