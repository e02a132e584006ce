"""One SQLite file that survives being killed: WAL, one statement one transaction, SQLite's errors
as ours."""

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from worker.errors import ResourceError

_BUSY_SECONDS = 10.0
_DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


class Database:
    """The file at `path`, made if it is not there. Any thread and any process may use it.

    `synchronous` FULL: what `execute` returned from survives a power cut; NORMAL: it survives the
    end of the process. Every method raises ResourceError, with one line, if the file is damaged or
    can't be read or written (a full disk, say).
    """

    def __init__(self, path: Path, schema: str, synchronous: Literal["FULL", "NORMAL"]) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(f"PRAGMA synchronous = {synchronous}")
            self._connection.executescript(schema)
        except (sqlite3.Error, OSError) as error:
            raise self._failure(error) from error

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run one statement, which is one transaction. Returns the rows that it selects."""
        with self._lock:
            try:
                return self._connection.execute(statement, parameters).fetchall()
            except sqlite3.Error as error:
                raise self._failure(error) from error

    def ensure_column(self, table: str, column: str, kind: str) -> None:
        """Add the column, empty, to a file of before it was there. Names and kind are ours, never
        an untrusted peer's."""
        if not self._has_column(table, column):
            try:
                self.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
            except ResourceError:
                if not self._has_column(table, column):  # else another process was faster
                    raise

    def _has_column(self, table: str, column: str) -> bool:
        return any(name == column for _, name, *_ in self.execute(f"PRAGMA table_info({table})"))

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _failure(self, error: sqlite3.Error | OSError) -> ResourceError:
        # The low byte is the kind of error, what is above it says more; Python's own errors have no
        # code.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            return ResourceError(
                f"{self._path}: {error}; restore it from a backup, or move it away to begin an"
                " empty one"
            )
        return ResourceError(
            f"{self._path}: {error}; expected a SQLite file that this user can write, on a disk"
            " with room; make room or rights and start again, what was written before stays"
        )
