"""Memory that other programs have taken: told apart from what this process needs, and waited for.

What is free and what this process uses add up to what it could have. When that sum falls, others
have taken memory. So a shortage of their making says nothing about what fits on this machine.
"""

import logging
import time
from collections.abc import Callable

import torch

from worker.policy import memory

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 15.0
_POLL_SECONDS = 0.2
_BETWEEN_WAITS_SECONDS = 600.0
_SLACK = 0.1
"""The sum changes a little by itself: caches, shared pages, our own children."""


class Shortage:
    """Watches the memory of `device`. Call `look` whenever much of it is about to be used."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most = 0
        self._not_before = 0.0

    def look(self) -> None:
        """Remember how much this process could have, if that is the most so far."""
        self._most = max(self._most, self._reachable())

    def is_foreign(self) -> bool:
        """Return whether others have taken memory since there was the most."""
        return self._reachable() < (1 - _SLACK) * self._most

    def wait(self, is_enough: Callable[[], bool] | None = None) -> bool:
        """Wait some seconds for memory that others have taken, and return whether there is enough
        again.

        `is_enough`: None means as much as there was. Returns False at once for a shortage of our
        own making, and for ten minutes after it has waited in vain.
        """
        if not self.is_foreign() or time.monotonic() < self._not_before:
            return False
        log.warning(
            "other programs have taken memory, waiting for it MiB=%d seconds=%.0f",
            (self._most - self._reachable()) >> 20,
            PATIENCE_SECONDS,
        )
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            if (is_enough or self._is_over)():
                return True
            time.sleep(_POLL_SECONDS)
        self._not_before = time.monotonic() + _BETWEEN_WAITS_SECONDS
        return False

    def _is_over(self) -> bool:
        return not self.is_foreign()

    def _reachable(self) -> int:
        return memory.free(self._device) + memory.used(self._device)
