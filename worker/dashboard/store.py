"""The swarm's history on disk (SQLite): old entries of the chain's log, and figures of nodes.

The store is a copy. If it is lost or damaged it is made again, as far back as the chain's log goes.
The entries of a piece of the log and the position after it are written in one transaction, so that
each entry counts once, even after `kill -9`. One process writes (`Store`); pages read through
connections of their own (`reading`).

Rewards are in thousandths, limited to integers that are exact in SQLite and browsers. The rewards
of each peer are kept for the newest RECENT_ROUNDS rounds, and as sums over SPAN_ROUNDS rounds
before that.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from worker.chain.coordinator import Event
from worker.dashboard.counts import Peer
from worker.errors import ResourceError
from worker.multiaddr import is_recorded_id
from worker.swarm.identity import animal_name

log = logging.getLogger(__name__)

FILE = "history.db"
MAX_ROUNDS = 100_000
RECENT_ROUNDS = 200
SPAN_ROUNDS = 100
CURVE_ROUNDS = {1: 1_000, SPAN_ROUNDS: MAX_ROUNDS}
"""Number of rounds that curves are kept for, by the number of rounds per point."""
MAX_PEERS = 10_000
MAX_EVENTS = 1_000
MAX_CURVES = 64
"""Largest number of curves (families, reasons...), in case a node reports made-up names."""
_MAX_BLOCKS = 1_000
_LARGEST = 2**52
_VERSION = 1
_SCHEMA = """
CREATE TABLE marks (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE blocks (number INTEGER PRIMARY KEY, hash TEXT);
CREATE TABLE peers (
  number INTEGER PRIMARY KEY, peer_id TEXT UNIQUE NOT NULL, name TEXT NOT NULL, account TEXT,
  total INTEGER, audited INTEGER, wins INTEGER NOT NULL DEFAULT 0, last_round INTEGER,
  last_vote INTEGER, last_reward INTEGER
);
CREATE TABLE rounds (number INTEGER PRIMARY KEY, total INTEGER, num_peers INTEGER);
CREATE TABLE rewards (
  peer INTEGER, round INTEGER, stage INTEGER, reward INTEGER, block INTEGER, is_first INTEGER,
  PRIMARY KEY (peer, round, stage)
) WITHOUT ROWID;
CREATE INDEX rewards_by_round ON rewards (round);
CREATE TABLE spans (
  peer INTEGER, span INTEGER, total INTEGER, num INTEGER, PRIMARY KEY (peer, span)
) WITHOUT ROWID;
CREATE TABLE transactions (
  block INTEGER, hash TEXT, kind TEXT, peer INTEGER, round INTEGER, detail TEXT
);
CREATE INDEX transactions_by_block ON transactions (block);
CREATE INDEX transactions_by_peer ON transactions (peer, block);
CREATE TABLE times (block INTEGER PRIMARY KEY, at REAL);
CREATE TABLE curves (
  name TEXT, width INTEGER, round INTEGER, total REAL, num INTEGER,
  PRIMARY KEY (name, width, round)
) WITHOUT ROWID;
CREATE TRIGGER gone AFTER DELETE ON peers BEGIN
  DELETE FROM rewards WHERE peer = OLD.number;
  DELETE FROM spans WHERE peer = OLD.number;
  DELETE FROM transactions WHERE peer = OLD.number;
END;
CREATE TABLE events (at REAL, kind TEXT, subject TEXT, text TEXT);
"""


class Store:
    """The store for the one process that writes. `is_new`: it is empty, so read the whole log."""

    def __init__(self, folder: Path | None) -> None:
        """Open the store in a folder, or make it. None: a store in memory, without readers."""
        self.file = Path(":memory:") if folder is None else folder / FILE
        self._is_on_disk = folder is not None
        self._lock = threading.RLock()
        self.is_new = False
        self._connection = self._open()
        self._inode = self._find_inode()

    def close(self) -> None:
        self._connection.close()

    def ensure_whole(self) -> None:
        """Make the store again if its file was removed, replaced or damaged."""
        with self._lock:
            try:
                if self._find_inode() == self._inode:
                    self._connection.execute("SELECT value FROM marks LIMIT 1").fetchone()
                    return
                reason = "replaced"
            except FileNotFoundError:
                reason = "removed"
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                reason = str(error)
            self.rebuild(reason)

    def rebuild(self, reason: str) -> None:
        """Begin with an empty store."""
        log.warning("history is made again from the chain file=%s reason=%s", self.file, reason)
        with suppress(sqlite3.Error):
            self._connection.close()
        self._remove()
        self._connection = self._open()
        self._inode = self._find_inode()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write everything in the block, or nothing. A damaged store is made again."""
        with self._lock:
            try:
                with self._connection:
                    yield
            except sqlite3.DatabaseError as error:
                if _is_damage(error):
                    self.rebuild(str(error))
                raise

    # ---- the chain's log

    def mark(self, name: str) -> Any:
        """Return the value stored under a name; None: nothing is stored there."""
        row = self._execute("SELECT value FROM marks WHERE name = ?", name).fetchone()
        return None if row is None else row[0]

    def set_mark(self, name: str, value: Any) -> None:
        self._execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", name, value)

    def take(self, event: Event, current_round: int) -> None:
        """Add a log entry. Call it once for each, within `writing`."""
        said = event.arguments
        if event.name == "RoundAdvanced":
            self._add_transaction(event, None, said["newRoundNumber"], "")
            return
        if not is_recorded_id(said["peerId"]):
            return
        number = said.get("roundNumber")
        if number is not None and not 0 <= current_round - number < MAX_ROUNDS:
            return  # its round is not kept
        peer = self._number_of(said["peerId"])
        detail = ""
        if event.name == "RewardSubmitted" and number is not None:
            reward = _exact(said["reward"])
            self._add_reward(peer, number, min(said["stageNumber"], _LARGEST), reward, event.block)
            detail = str(reward)
        elif event.name == "WinnerSubmitted":
            detail = " ".join(filter(is_recorded_id, said["winners"][:3]))
        self._add_transaction(event, peer, number, detail)

    def _add_reward(self, peer: int, number: int, stage: int, reward: int, block: int) -> None:
        first = self._execute(
            "SELECT 1 FROM rewards WHERE peer = ? AND round = ?", peer, number
        ).fetchone()
        is_first = int(first is None)
        added = self._execute(
            "INSERT OR IGNORE INTO rewards VALUES (?, ?, ?, ?, ?, ?)",
            *(peer, number, stage, reward, block, is_first),
        )
        if not added.rowcount:
            return
        self._execute(
            "INSERT INTO rounds VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET"
            " total = total + excluded.total, num_peers = num_peers + excluded.num_peers",
            *(number, reward, is_first),
        )
        self._execute(
            "INSERT INTO spans VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " total = total + excluded.total, num = num + excluded.num",
            *(peer, number // SPAN_ROUNDS, reward, is_first),
        )

    def _add_transaction(
        self, event: Event, peer: int | None, number: int | None, detail: str
    ) -> None:
        self._execute(
            "INSERT INTO transactions VALUES (?, ?, ?, ?, ?, ?)",
            *(event.block, event.tx_hash, event.name, peer, number, detail),
        )

    def _number_of(self, peer_id: str) -> int:
        found = self._execute("SELECT number FROM peers WHERE peer_id = ?", peer_id).fetchone()
        if found is None:
            found = self._execute(
                "INSERT INTO peers (peer_id, name) VALUES (?, ?) RETURNING number",
                *(peer_id, animal_name(peer_id)),
            ).fetchone()
        return int(found[0])

    def put_peers(self, peers: Mapping[str, Peer], audited: Mapping[str, int | None]) -> None:
        """Update the peers' sums, which come from the contract and the last audit."""
        self._connection.executemany(
            "INSERT INTO peers (peer_id, name, account, total, audited, wins, last_round,"
            " last_vote, last_reward) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (peer_id) DO UPDATE SET account = coalesce(excluded.account, account),"
            " total = excluded.total, audited = excluded.audited, wins = excluded.wins,"
            " last_round = coalesce(excluded.last_round, last_round),"
            " last_vote = coalesce(excluded.last_vote, last_vote),"
            " last_reward = coalesce(excluded.last_reward, last_reward)",
            (_peer_row(peer_id, peer, audited.get(peer_id)) for peer_id, peer in peers.items()),
        )

    def forget_old(self, current_round: int) -> None:
        """Drop the rows beyond the limits."""
        oldest = current_round - RECENT_ROUNDS
        self._execute("DELETE FROM rewards WHERE round <= ?", oldest)
        self._execute("DELETE FROM transactions WHERE round <= ?", oldest)
        self._execute("DELETE FROM rounds WHERE number <= ?", current_round - MAX_ROUNDS)
        for width, kept in CURVE_ROUNDS.items():
            self._execute(
                "DELETE FROM curves WHERE width = ? AND round <= ?", width, current_round - kept
            )
        self._execute(
            "DELETE FROM peers WHERE number IN (SELECT number FROM peers"
            " ORDER BY coalesce(last_round, -1) DESC, number LIMIT -1 OFFSET ?)",
            MAX_PEERS,
        )

    # ---- blocks: which the log was read up to, and when they were

    def add_block(self, number: int, hash: str | None) -> None:
        """Note that the log was read up to this block."""
        self._execute("INSERT OR REPLACE INTO blocks VALUES (?, ?)", number, hash)
        self._execute(
            "DELETE FROM blocks WHERE number NOT IN"
            " (SELECT number FROM blocks ORDER BY number DESC LIMIT ?)",
            _MAX_BLOCKS,
        )

    def blocks(self) -> list[tuple[int, str | None]]:
        """Return the blocks that the log was read up to, newest first."""
        return self._execute("SELECT number, hash FROM blocks ORDER BY number DESC").fetchall()

    def cut_back(self, block: int) -> None:
        """Remove everything from blocks after this one, which are gone."""
        log.warning("history is taken back to block %d, the blocks after it are gone", block)
        self._execute(
            "UPDATE rounds SET total = total - late.reward, num_peers = num_peers - late.peers FROM"
            " (SELECT round, sum(reward) AS reward, sum(is_first) AS peers FROM rewards"
            " WHERE block > ? GROUP BY round) AS late WHERE late.round = number",
            block,
        )
        self._execute(
            "UPDATE spans SET total = total - late.reward, num = num - late.peers FROM"
            " (SELECT peer, round / ? AS span, sum(reward) AS reward, sum(is_first) AS peers"
            " FROM rewards WHERE block > ? GROUP BY 1, 2) AS late"
            " WHERE late.peer = spans.peer AND late.span = spans.span",
            *(SPAN_ROUNDS, block),
        )
        self._execute("DELETE FROM rounds WHERE num_peers <= 0")
        self._execute("DELETE FROM rewards WHERE block > ?", block)
        self._execute("DELETE FROM transactions WHERE block > ?", block)
        self._execute("DELETE FROM times WHERE block > ?", block)
        self._execute("DELETE FROM blocks WHERE number > ?", block)
        self._execute("UPDATE marks SET value = min(value, ?) WHERE name LIKE 'next/%'", block + 1)

    def untimed_blocks(self, most: int) -> list[int]:
        """Return the newest blocks with transactions whose time is not known."""
        rows = self._execute(
            "SELECT DISTINCT block FROM (SELECT block FROM transactions ORDER BY block DESC"
            " LIMIT 100) WHERE block NOT IN (SELECT block FROM times) ORDER BY block DESC LIMIT ?",
            most,
        )
        return [row[0] for row in rows]

    def set_time(self, block: int, at: float) -> None:
        self._execute("INSERT OR REPLACE INTO times VALUES (?, ?)", block, at)

    # ---- figures of nodes

    def add_figures(self, round: int, figures: Iterable[tuple[str, float]]) -> None:
        """Add figures of a node's round to the curves of these names."""
        if not 0 <= round <= _LARGEST:
            return
        known = {row[0] for row in self._execute("SELECT DISTINCT name FROM curves")}
        for name, value in figures:
            if name not in known and len(known) >= MAX_CURVES:
                continue
            known.add(name)
            for width in CURVE_ROUNDS:
                self._execute(
                    "INSERT INTO curves VALUES (?, ?, ?, ?, 1) ON CONFLICT DO UPDATE SET"
                    " total = total + excluded.total, num = num + 1",
                    *(name, width, round // width * width, value),
                )

    def add_event(self, kind: str, subject: str, text: str, at: float | None = None) -> None:
        """Add an event. `at`: Unix time; None: now."""
        at = time.time() if at is None else at
        self._execute("INSERT INTO events VALUES (?, ?, ?, ?)", at, kind, subject, text)
        self._execute(
            "DELETE FROM events WHERE rowid NOT IN"
            " (SELECT rowid FROM events ORDER BY rowid DESC LIMIT ?)",
            MAX_EVENTS,
        )

    # ---- the file

    def _execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        return self._connection.execute(statement, values)

    def _open(self) -> sqlite3.Connection:
        """Open the file; one that is damaged or of another version is made again."""
        for _ in range(2):
            connection = sqlite3.connect(self.file, timeout=10, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                found = connection.execute("PRAGMA user_version").fetchone()[0]
                is_whole = connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
                if found == _VERSION and is_whole:
                    self.is_new = False
                    return connection
                if found == 0 and is_whole and not _tables(connection):
                    connection.executescript(
                        f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;"
                    )
                    self.is_new = True
                    return connection
                reason = "damaged" if not is_whole else f"version {found}, expected {_VERSION}"
            except sqlite3.DatabaseError as error:
                reason = str(error)
            connection.close()
            log.warning("history can't be used, it is made again file=%s: %s", self.file, reason)
            self._remove()
        raise ResourceError(f"{self.file}: can't be made; expected a folder to write in")

    def _find_inode(self) -> int:
        return self.file.stat().st_ino if self._is_on_disk else 0

    def _remove(self) -> None:
        if not self._is_on_disk:
            return
        for suffix in ("", "-wal", "-shm"):
            self.file.with_name(self.file.name + suffix).unlink(missing_ok=True)


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Return whether the file is damaged; a full disk, for example, leaves it whole."""
    return type(error) is sqlite3.DatabaseError


def _tables(connection: sqlite3.Connection) -> list[Any]:
    return connection.execute("SELECT name FROM sqlite_master").fetchall()


@contextmanager
def reading(file: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection that only reads. Raises sqlite3.Error if there is no readable store."""
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5)) as connection:
        connection.row_factory = sqlite3.Row
        yield connection


def _peer_row(peer_id: str, peer: Peer, audited: int | None) -> tuple[Any, ...]:
    last = peer.last_round
    return (
        *(peer_id, animal_name(peer_id), peer.account),
        *(_exact(peer.total), _exact(audited), _exact(peer.wins), last, peer.last_vote),
        None if last is None else _exact(peer.rewards[last]),
    )


def _exact(value: Any) -> Any:
    """Return the nearest integer that is exact in SQLite and browsers; None stays None."""
    return None if value is None else max(-_LARGEST, min(_LARGEST, value))
