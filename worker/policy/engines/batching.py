"""The number of answers that are generated at once: all, until memory does not take them.

On a CPU a piece is cut in two before it is tried if it would not fit: a kernel that promised memory
ends the process that uses it. That is an estimate from what is free now, so it is made again for
each piece and never remembered. On a GPU, and where a CPU's allocator does say no, the piece that
failed is cut in two and made again. That limit is remembered, also in the next life of the node,
and raised again a bit at a time. Memory that other programs have taken is waited for, and teaches
nothing. Answers do not depend on how they are cut: each row has random numbers of its own.
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
"""Of the memory that is free: what is needed is an estimate, and we are not alone."""


_FIRST_PAUSE, _LONGEST_PAUSE = 2, 64
"""Batches between two tries with more rows: twice as many after each that failed."""


class Rows:
    """`limit`: rows of a piece at most. None: nothing has failed yet. `smallest_share`: of the rows
    of the last batch, those of its smallest piece but the last; 1.0: all at once; None: nothing was
    made yet."""

    def __init__(self, device: torch.device) -> None:
        self.limit: int | None = None
        self.smallest_share: float | None = None
        self._device = device
        self._shortage = Shortage(device)
        self._has_said = False
        self._file: Path | None = None
        self._key = ""
        self._pause = self._batches_left = _FIRST_PAUSE
        self._proven: int | None = None  # the limit before the one that is being tried

    def remember_in(self, file: Path, key: str) -> None:
        """Take the limit that `file` has for `key`, and write down what is learnt from now on."""
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
        self, num_rows: int, needed: Callable[[range], int], make: Callable[[range], list[Sampled]]
    ) -> list[Sampled]:
        """`make` of all rows, in as many pieces as it takes; `needed` are the bytes of a piece.

        Raises ResourceError if not even one row fits.
        """
        self._shortage.look()
        self._has_said = False
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
            # The error is gone here, and with it what its frames held.
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

    def _next_piece(self, start: int, num_rows: int, needed: Callable[[range], int]) -> range:
        """As many rows as the limit allows and, on a CPU, as memory is free for."""
        whole = range(start, min(num_rows, start + (self.limit or num_rows)))
        if self._device.type != "cpu" or self._fits(needed(whole)):
            return whole
        if self._shortage.wait(lambda: self._fits(needed(whole))):
            return whole
        # One row is tried even if it seems too much: it is an estimate.
        sizes = range(1, len(whole))
        size = max(1, bisect_left(sizes, True, key=lambda n: not self._fits(needed(whole[:n]))))
        if not self._has_said:
            self._has_said = True
            log.warning(
                "little memory is free, answers are generated in smaller pieces for now rows=%d of=%d: about %d MiB "
                "are needed, %d MiB are there",
                size, len(whole), needed(whole) >> 20, self._room() >> 20,
            )  # fmt: skip
        return whole[:size]

    def _fits(self, wanted: int) -> bool:
        return wanted <= self._room()

    def _room(self) -> int:
        return int(_SHARE * memory.free(self._device))

    def _halve(self, piece: range, reason: str) -> None:
        self.limit = len(piece) // 2
        if self._proven is not None:  # more was tried, and does not fit
            self.limit, self._proven = self._proven, None
            self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
        self._batches_left = self._pause
        log.warning(
            "out of memory, answers are generated in smaller pieces rows=%d before=%d error=%s",
            self.limit, len(piece), reason,
        )  # fmt: skip
        if not self._shortage.is_foreign():
            self._write_down()

    def _try_more(self) -> None:
        """Raise the limit by half now and then."""
        if self.limit is None:
            return
        self._batches_left -= 1
        if self._batches_left < 0:
            self._proven, self._batches_left = self.limit, self._pause
            self.limit += max(1, self.limit // 2)

    def _keep_what_fitted(self, num_rows: int) -> None:
        """A limit that was tried and did not fail is the new one; none is needed once it is as
        large as all rows."""
        if self._proven is None or self.limit is None:
            return
        log.info(
            "answers are generated in larger pieces rows=%d before=%d", self.limit, self._proven
        )
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
