"""The number of the current round, from the chain or, without a chain, counted locally."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from worker.errors import ChainUnreachable
from worker.runtime.outage import Outage

logger = logging.getLogger(__name__)


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
        """Block until the round is later than `after`, calling `waiting` each time it is checked.

        Returns None if the round is unknown (the chain can't be reached, or is behind `after`
        because it was restored from an older state), or if `deadline` (time.monotonic) has passed.
        """


class RoundSource(Protocol):
    """The part of chain.coordinator.Coordinator that a clock reads."""

    def current_round(self) -> int: ...
    def current_stage(self) -> int: ...


class ChainClock:
    """The chain's round, read every `poll_seconds`. Missed rounds are not made up for."""

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
                        "chain is behind, was it restored? training continues without it until"
                        " it has caught up round=%d last_trained=%d",
                        current.round,
                        after,
                    )
                self._is_behind = True
                return None
            if deadline is not None and time.monotonic() >= deadline:
                return None
            time.sleep(self._poll_seconds)


class LocalClock:
    """No chain is set: a round follows as soon as the last one is done."""

    def next(
        self,
        after: int,
        waiting: Callable[[], None],
        deadline: float | None = None,
    ) -> Tick | None:
        waiting()
        return Tick(after + 1, 0)
