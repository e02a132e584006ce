"""Recognise that other programs have taken memory, and wait until it is free again.

This process can have at most the free memory plus its own. If that sum falls, other programs have
taken memory, and running out of it does not show how much fits on this machine.
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
"""Share by which the sum varies anyway, by caches, shared pages and child processes."""


class Shortage:
    """Watches the memory of `device`. Call `look` whenever much of it is about to be used."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most = 0
        self._not_before = 0.0

    def look(self) -> None:
        """Record the memory that this process could have, if it is the most so far."""
        self._most = max(self._most, self._reachable())

    def is_foreign(self) -> bool:
        """Return whether other programs have taken memory since the maximum was recorded."""
        return self._reachable() < (1 - _SLACK) * self._most

    def wait(
        self,
        is_enough: Callable[[], bool] | None = None,
    ) -> bool:
        """Wait some seconds for memory that others have taken; return whether there is enough.

        `is_enough` decides that; None: as much as before. Returns False at once if others have not
        taken memory, and for ten minutes after a wait without success.
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
            if is_enough() if is_enough else not self.is_foreign():
                return True
            time.sleep(_POLL_SECONDS)
        self._not_before = time.monotonic() + _BETWEEN_WAITS_SECONDS
        return False

    def _reachable(self) -> int:
        return memory.free(self._device) + memory.used(self._device)
