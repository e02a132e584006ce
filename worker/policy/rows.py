"""How many answers are generated at once: all, until memory does not take them.

On a CPU a piece is cut in two before it is tried if it would not fit: a kernel that promised memory ends the process
that uses it. On a GPU, and where a CPU's allocator does say no, the piece that failed is cut in two and made again.
What fits is remembered, also in the next life of the node. Answers do not depend on how they are cut: each row has
random numbers of its own.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from worker.errors import ResourceError
from worker.policy import memory
from worker.policy.engine import Sampled

log = logging.getLogger(__name__)

_SHARE = 0.8
"""Of the memory that is free: what is needed is an estimate, and we are not alone."""


class Rows:
    """`limit`: rows of a piece at most. None: nothing has failed yet."""

    def __init__(self, device: torch.device) -> None:
        self.limit: int | None = None
        self._device = device
        self._file: Path | None = None
        self._key = ""

    def remember_in(self, file: Path, key: str) -> None:
        """Take the limit that `file` has for `key`, and write down what is learnt from now on."""
        self._file, self._key = file, key
        record = memory.recall(file, key)
        if record is None:
            return
        limit = record.get("rows")
        if type(limit) is not int or limit < 1:
            log.warning("limit of rows is damaged, it is found again path=%s", file)
            return
        self.limit = limit

    def run(
        self, num_rows: int, needed: Callable[[range], int], make: Callable[[range], list[Sampled]]
    ) -> list[Sampled]:
        """`make` of all rows, in as many pieces as it takes; `needed` are the bytes of a piece.

        Raises ResourceError if not even one row fits.
        """
        done: list[Sampled] = []
        while len(done) < num_rows:
            piece = range(len(done), min(num_rows, len(done) + (self.limit or num_rows)))
            if self._is_too_much(piece, needed):
                continue
            try:
                done += make(piece)
                continue
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out_of_memory(error):
                    raise
                reason = memory.reason_of(error)
            # The error is gone here, and with it what its frames held.
            memory.release(self._device)
            if len(piece) == 1:
                raise ResourceError(
                    f"out of memory on a single answer ({reason}); free memory, or lower "
                    "generation.max_completion_length or generation.max_prompt_length"
                )
            self._halve(piece, reason)
        return done

    def _is_too_much(self, piece: range, needed: Callable[[range], int]) -> bool:
        if self._device.type != "cpu" or len(piece) == 1:
            return False
        wanted, free = needed(piece), int(_SHARE * memory.free(self._device))
        if wanted <= free:
            return False
        self._halve(piece, f"about {wanted >> 20} MiB are needed, {free >> 20} MiB are there")
        return True

    def _halve(self, piece: range, reason: str) -> None:
        self.limit = len(piece) // 2
        log.warning(
            "out of memory, answers are generated in smaller pieces rows=%d before=%d error=%s",
            self.limit, len(piece), reason,
        )  # fmt: skip
        if self._file is not None:
            memory.remember(self._file, self._key, {"rows": self.limit})
