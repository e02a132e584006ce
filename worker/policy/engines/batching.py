"""Split the answers of a round into as few batches as memory allows.

On a CPU a batch that would not fit is split before it is tried, because the kernel overcommits
memory and later kills the process that uses it. The decision is an estimate from the memory that is
free now, so it is made for each batch and never stored. On a GPU, and if a CPU's allocator fails,
the batch that failed is split and repeated. The resulting limit is stored, also for the next start
of the node, and raised again step by step. If other programs have taken memory, the node waits for
it, and the limit does not change. Answers do not depend on the split, because each row has its own
random numbers.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import torch

from worker.errors import ResourceError
from worker.policy import memory
from worker.policy.engines.engine import Sampled
from worker.policy.memory_shortage import Shortage

log = logging.getLogger(__name__)

_SHARE = 0.8
"""Share of the free memory to use: the need is an estimate, and other programs run too."""

_FIRST_PAUSE, _LONGEST_PAUSE = 2, 64
"""Number of calls between two attempts with more rows; doubled after each failed attempt."""


class Rows:
    """Splits rows into pieces that fit into memory.

    `limit` is the largest number of rows of a piece; None: nothing has failed yet. `smallest_share`
    is the size of the smallest piece of the last call, except the last piece, as a share of its
    rows; 1.0: one piece; None: no call yet.
    """

    def __init__(self, device: torch.device) -> None:
        self.limit: int | None = None
        self.smallest_share: float | None = None
        self._device = device
        self._shortage = Shortage(device)
        self._has_warned = False
        self._file: Path | None = None
        self._key = ""
        self._pause = self._batches_left = _FIRST_PAUSE
        self._proven: int | None = None  # the limit before the present attempt with more rows

    def remember_in(self, file: Path, key: str) -> None:
        """Read the limit for `key` from `file`, and store later limits there."""
        self._file, self._key = file, key
        record = memory.recall(file, key)
        if record is None:
            return
        limit = record.get("rows")
        if type(limit) is not int or limit < 1:
            log.warning("ignoring corrupt batch-size limit; measuring it again path=%s", file)
            return
        self.limit = limit

    def run(
        self,
        num_rows: int,
        needed: Callable[[range], int],
        make: Callable[[range], list[Sampled]],
    ) -> list[Sampled]:
        """Return `make` of all rows, in pieces that fit; `needed` estimates the bytes of a piece.

        Raises ResourceError if not even one row fits.
        """
        self._shortage.look()
        self._has_warned = False
        self._try_more()
        done: list[Sampled] = []
        share = 1.0
        while len(done) < num_rows:
            piece = self._next_piece(len(done), num_rows, needed)
            try:
                done += make(piece)
                if len(done) < num_rows:
                    share = min(share, len(piece) / num_rows)
                continue
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out_of_memory(error):
                    raise
                reason = memory.reason_of(error)
            # Out of the except block, so that the error's frames no longer keep tensors alive.
            memory.release(self._device)
            if self._shortage.wait():
                continue
            if len(piece) == 1:
                raise ResourceError(
                    f"out of memory on a single answer ({reason}); free memory, or lower "
                    "generation.max_completion_length or generation.max_prompt_length"
                )
            self._halve(piece, reason)
        self.smallest_share = share
        self._keep_what_fitted(num_rows)
        return done

    def _next_piece(
        self,
        start: int,
        num_rows: int,
        needed: Callable[[range], int],
    ) -> range:
        """Return as many rows as the limit allows and, on a CPU, as fit into the free memory."""
        whole = range(start, min(num_rows, start + (self.limit or num_rows)))
        if self._device.type != "cpu" or self._fits(needed(whole)):
            return whole
        if self._shortage.wait(lambda: self._fits(needed(whole))):
            return whole
        # At least one row is tried, because the need is only an estimate.
        sizes = range(1, len(whole))
        size = max(1, bisect_left(sizes, True, key=lambda n: not self._fits(needed(whole[:n]))))
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "too little free memory for the whole batch; generating in smaller batches for now"
                " rows=%d of=%d: about %d MiB are needed, %d MiB are free",
                size,
                len(whole),
                needed(whole) >> 20,
                self._room() >> 20,
            )
        return whole[:size]

    def _fits(self, wanted: int) -> bool:
        return wanted <= self._room()

    def _room(self) -> int:
        return int(_SHARE * memory.free(self._device))

    def _halve(self, piece: range, reason: str) -> None:
        self.limit = len(piece) // 2
        if self._proven is not None:  # an attempt with more rows failed
            self.limit, self._proven = self._proven, None
            self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
        self._batches_left = self._pause
        log.warning(
            "out of memory; generating in smaller batches rows=%d before=%d error=%s",
            self.limit,
            len(piece),
            reason,
        )
        if not self._shortage.is_foreign():
            self._write_down()

    def _try_more(self) -> None:
        """Raise the limit by half every `_pause` calls."""
        if self.limit is None:
            return
        self._batches_left -= 1
        if self._batches_left < 0:
            self._proven, self._batches_left = self.limit, self._pause
            self.limit += max(1, self.limit // 2)

    def _keep_what_fitted(self, num_rows: int) -> None:
        """Accept a raised limit that did not fail; drop it once it is as large as all rows."""
        if self._proven is None or self.limit is None:
            return
        log.info("generating in larger batches rows=%d before=%d", self.limit, self._proven)
        self._proven, self._pause = None, _FIRST_PAUSE
        if self.limit >= num_rows:
            self.limit = None
        self._write_down()

    def _write_down(self) -> None:
        if self._file is None:
            return
        if self.limit is None:
            self._file.unlink(missing_ok=True)
        else:
            memory.remember(self._file, self._key, {"rows": self.limit})
