"""The readable record of a node's bets, prg_record.txt: each line once, even if a node is killed.

A line is written to the journal together with the change that it describes, and from there to the
file.
"""

import logging
import os
from pathlib import Path

from worker.market.journal import Journal
from worker.runtime.files import append_line
from worker.runtime.outage import Outage

log = logging.getLogger(__name__)

_TAIL_BYTES = 65_536
"""Number of bytes at the end of the file that are searched for lines that are there already."""


class Record:
    """The file at `path`, with the lines of `journal`."""

    def __init__(self, path: Path, journal: Journal) -> None:
        self._path = path
        self._journal = journal
        self._outage = Outage(log)

    def write(self) -> None:
        """Append the lines that are not in the file yet. If it can't be written, they wait."""
        waiting = self._journal.lines()
        if not waiting:
            return
        try:
            self._append([line for _, line in waiting])
        except OSError as error:
            self._outage.begin(
                "record of the prediction market not written file=%s error=%s",
                self._path,
                error.strerror,
            )
            return
        self._outage.end("record of the prediction market written again file=%s", self._path)
        for number, _ in waiting:
            self._journal.drop_line(number)

    def _append(self, lines: list[str]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        there = self._tail()
        for line in lines:
            if line not in there:  # otherwise the node was killed right after it was written
                append_line(self._path, line)
                log.info("prediction market: %s", line)

    def _tail(self) -> list[str]:
        try:
            with self._path.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - _TAIL_BYTES))
                return stream.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return []
