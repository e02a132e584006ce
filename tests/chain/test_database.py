"""A SQLite file that survives kills, and says in one line what is wrong with it."""

import multiprocessing
import os
import signal
import sqlite3
import threading
from pathlib import Path

import pytest

from worker.chain.database import Database
from worker.errors import ResourceError

SCHEMA = "CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL)"


def opened(path: Path) -> Database:
    return Database(path, SCHEMA, "FULL")


def test_rows_come_back_after_reopening_in_a_folder_that_it_makes(tmp_path: Path) -> None:
    database = opened(tmp_path / "new/notes.db")
    assert database.execute("INSERT INTO notes (text) VALUES (?)", ("a",)) == []
    database.close()
    assert opened(tmp_path / "new/notes.db").execute("SELECT id, text FROM notes") == [(1, "a")]


def _insert_and_die(path: Path) -> None:
    database = opened(path)
    database.execute("INSERT INTO notes (text) VALUES (?)", ("kept",))
    os.kill(os.getpid(), signal.SIGKILL)


def test_statement_that_returned_survives_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    child = multiprocessing.get_context("fork").Process(target=_insert_and_die, args=(file,))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert opened(file).execute("SELECT text FROM notes") == [("kept",)]


def test_threads_may_share_it(tmp_path: Path) -> None:
    database = opened(tmp_path / "notes.db")

    def insert() -> None:
        for _ in range(25):
            database.execute("INSERT INTO notes (text) VALUES ('x')")

    threads = [threading.Thread(target=insert) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert database.execute("SELECT count(*) FROM notes") == [(100,)]


def test_invalid_statement_changes_nothing_and_names_the_file(tmp_path: Path) -> None:
    database = opened(tmp_path / "notes.db")
    with pytest.raises(ResourceError, match=r"notes\.db: NOT NULL constraint failed: notes\.text"):
        database.execute("INSERT INTO notes (text) VALUES (NULL)")
    assert database.execute("SELECT * FROM notes") == []


def test_file_that_is_no_database_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    file.write_bytes(b"not a database" * 100)
    with pytest.raises(ResourceError, match="restore it from a backup, or move it away") as caught:
        opened(file)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == b"not a database" * 100


def test_folder_that_can_t_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="expected a SQLite file that this user can write"):
        opened(tmp_path / "file/notes.db")


def test_column_is_added_to_a_file_of_an_earlier_version_once(tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    before = opened(file)
    before.execute("INSERT INTO notes (text) VALUES ('old')")
    before.close()
    for _ in range(2):
        database = opened(file)
        database.ensure_column("notes", "colour", "TEXT")
        assert database.execute("SELECT text, colour FROM notes") == [("old", None)]
        database.close()


def test_column_that_another_process_adds_at_the_same_time_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = opened(tmp_path / "notes.db")
    with sqlite3.connect(tmp_path / "notes.db") as other:
        other.execute("ALTER TABLE notes ADD COLUMN colour TEXT")
    answers = iter([False, True])
    monkeypatch.setattr(database, "_has_column", lambda table, column: next(answers))
    database.ensure_column("notes", "colour", "TEXT")


def test_column_of_a_table_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no such table: letters"):
        opened(tmp_path / "notes.db").ensure_column("letters", "colour", "TEXT")


def test_transaction_that_sqlite_undid_by_itself_tells_why(tmp_path: Path) -> None:
    """As it does when the disk is full."""
    database = opened(tmp_path / "notes.db")
    database.execute("INSERT INTO notes VALUES (1, 'a')")
    with (
        pytest.raises(ResourceError, match="UNIQUE constraint failed"),
        database.transaction() as run,
    ):
        run("INSERT OR ROLLBACK INTO notes VALUES (1, 'b')")
    with database.transaction() as run:
        run("INSERT INTO notes VALUES (2, 'c')")
    assert database.execute("SELECT text FROM notes") == [("a",), ("c",)]


def test_transaction_that_can_t_be_committed_is_undone(tmp_path: Path) -> None:
    database = opened(tmp_path / "notes.db")
    database.execute("PRAGMA foreign_keys = ON")
    reference = "REFERENCES notes DEFERRABLE INITIALLY DEFERRED"
    database.execute(f"CREATE TABLE answers (note INTEGER {reference})")
    with (
        pytest.raises(ResourceError, match="FOREIGN KEY constraint failed"),
        database.transaction() as run,
    ):
        run("INSERT INTO answers VALUES (7)")
    with database.transaction() as run:
        run("INSERT INTO notes VALUES (2, 'c')")
    assert database.execute("SELECT * FROM answers") == []
