"""A SQLite file that survives kills: WAL, one transaction per statement, errors translated."""

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from worker.errors import ResourceError

_BUSY_SECONDS = 10.0
_DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


class Database:
    """The file at `path`, created if missing. Safe for use by several threads and processes.

    With `synchronous` FULL, a statement that returned survives a power failure; with NORMAL, only
    the end of the process. Every method raises ResourceError, in one line, if the file is damaged
    or can't be read or written (for example, if the disk is full).
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        synchronous: Literal["FULL", "NORMAL"],
    ) -> None:
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

    def execute(
        self,
        statement: str,
        parameters: Sequence[object] = (),
    ) -> list[tuple[Any, ...]]:
        """Run one statement in its own transaction, and return the rows that it selects."""
        with self._lock:
            return self._run(statement, parameters)

    @contextmanager
    def transaction(self) -> Iterator[Callable[..., list[tuple[Any, ...]]]]:
        """Yield a function that runs statements as `execute` does, but all in one transaction.

        An exception in the block undoes them. The file is locked for other writers meanwhile.
        """
        with self._lock:
            self._run("BEGIN IMMEDIATE")
            try:
                yield self._run
                self._run("COMMIT")
            except BaseException:
                # SQLite has undone it already if, for example, the disk is full.
                if self._connection.in_transaction:
                    self._run("ROLLBACK")
                raise

    def migrate(
        self,
        migrations: Sequence[Sequence[str]],
    ) -> None:
        """Run the migrations that the file has not had yet, each in a transaction.

        Raises ResourceError if the file has had more of them, because a newer version wrote it.
        """
        for number, statements in enumerate(migrations, 1):
            with self.transaction() as run:
                ((version,),) = run("PRAGMA user_version")
                if version > len(migrations):
                    raise ResourceError(
                        f"{self._path}: has version {version} of its tables; expected at most"
                        f" {len(migrations)}; a newer hivewright wrote it, so use that one"
                    )
                if version < number:
                    for statement in statements:
                        run(statement)
                    run(f"PRAGMA user_version = {number}")

    def _run(
        self,
        statement: str,
        parameters: Sequence[object] = (),
    ) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def ensure_column(
        self,
        table: str,
        column: str,
        kind: str,
    ) -> None:
        """Add an empty column to a table of an earlier version, unless it is there.

        The arguments become parts of the statement, so never pass untrusted text.
        """
        if not self._has_column(table, column):
            try:
                self.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
            except ResourceError:
                if not self._has_column(table, column):  # otherwise another process was faster
                    raise

    def _has_column(
        self,
        table: str,
        column: str,
    ) -> bool:
        return any(name == column for _, name, *_ in self.execute(f"PRAGMA table_info({table})"))

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _failure(self, error: sqlite3.Error | OSError) -> ResourceError:
        # The low byte is the primary code, and higher bits refine it. OSErrors have none.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            return ResourceError(
                f"{self._path}: {error}; restore it from a backup, or move it away to begin an"
                " empty one"
            )
        return ResourceError(
            f"{self._path}: {error}; expected a SQLite file that this user can write, on a disk"
            " with room; make room or grant access, then start again, earlier records are kept"
        )
