"""The findings of the last audit, from the report of `hivewright audit`."""

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

VERDICTS = ("audited", "unaudited", "contradicted")
_REPORT_VERSION = 1
_MAX_FILE_BYTES = 64 * 1024 * 1024
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""Raised for a file that can't be read, or is not a report."""


class Verdicts:
    """Audited rewards of each peer, from the report in `file`, which may change at any time."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen: object = None
        self._peers: dict[str, dict[str, int]] = {}
        self._sums: dict[str, dict[str, int]] = {}
        self._updated_at: float | None = None
        self._error: str | None = None

    def look(self, contract: str) -> bool:
        """Read the report if it is new, and return whether it was.

        An unreadable or foreign one is ignored.
        """
        before = self._seen
        self._read(contract)
        return self._seen != before

    def _read(self, contract: str) -> None:
        try:
            found = self._file.stat()
            seen = contract, found.st_ino, found.st_mtime_ns, found.st_size
            if seen == self._seen:
                return
            self._seen = seen
            if found.st_size > _MAX_FILE_BYTES:
                raise ValueError(
                    f"has {found.st_size:,} bytes; expected at most {_MAX_FILE_BYTES:,}"
                )
            self._take(json.loads(self._file.read_text()), contract)
        except FileNotFoundError:
            self._seen = None
            self._forget("no report yet")
        except _UNREADABLE as error:
            self._forget("the report can't be read")
            log.warning("audit report can't be read file=%s error=%s", self._file, error)

    def of(
        self,
        peer_id: str,
    ) -> dict[str, int] | None:
        """Return the peer's number of rewards by verdict; None: the report does not name it."""
        return self._peers.get(peer_id)

    def audited_reward(self, peer_id: str) -> int | None:
        """Return the sum of the peer's audited rewards in thousandths; None without sums."""
        if self._updated_at is None or not self._sums:
            return None
        return self._sums.get(peer_id, {}).get("audited", 0)

    def told(self) -> dict[str, Any]:
        """Return when the report was written (Unix seconds), or why there is none."""
        return {"updated_at": self._updated_at, "error": self._error}

    def _take(
        self,
        report: dict[str, Any],
        contract: str,
    ) -> None:
        if (report["version"], report["contract"]) != (_REPORT_VERSION, contract):
            self._forget("the report is of another contract or version")
            return
        self._peers = _by_peer(report["peers"])
        self._sums = _by_peer(report.get("sums", {}))  # reports of earlier versions have none
        self._updated_at, self._error = float(report["updated_at"]), None

    def _forget(self, error: str) -> None:
        self._peers, self._sums = {}, {}
        self._updated_at, self._error = None, error


def _by_peer(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Return the figures for each verdict, by peer."""
    figures = {}
    for peer_id, row in table.items():
        figures[peer_id] = {name: int(row[name]) for name in VERDICTS}
    return figures
