"""The durable record of this node's rewards and votes: one row per (round, stage, peer).

A row is on disk (fsync) before its reward is sent anywhere, and is never deleted. The reward and
the vote of a row are two transactions, so each has a state:

    earned -> queued -> sent (hash) -> confirmed (block)
                                    -> rejected (reason)

Only the chain moves a row to a final state. This module stores the states; chain.settlement decides
on them.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from worker.chain.database import Database

Kind = Literal["reward", "vote"]
State = Literal["earned", "queued", "sent", "confirmed", "rejected"]
STATES: tuple[State, ...] = ("earned", "queued", "sent", "confirmed", "rejected")

_IS_UNSETTLED = (
    "reward_state IN ('earned', 'queued', 'sent') OR vote_state IN ('earned', 'queued', 'sent')"
)
_COLUMNS = """
    round INTEGER NOT NULL, stage INTEGER NOT NULL, peer_id TEXT NOT NULL,
    reward INTEGER NOT NULL, winners TEXT NOT NULL, earned_at REAL NOT NULL,
    reward_state TEXT NOT NULL, reward_hash TEXT, reward_sent_at REAL, reward_block INTEGER,
    reward_reason TEXT,
    vote_state TEXT, vote_hash TEXT, vote_sent_at REAL, vote_block INTEGER, vote_reason TEXT,
    digest TEXT
"""
_SCHEMA = f"""
    CREATE TABLE IF NOT EXISTS ledger ({_COLUMNS}, PRIMARY KEY (round, stage, peer_id))
        STRICT, WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS unsettled ON ledger (round, stage) WHERE {_IS_UNSETTLED};
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the ledger. `reward` is in milli-rewards, times are Unix seconds.

    `vote_state`: None if there was no peer to vote for. A hash is that of the last transaction
    sent; a block is one at which the chain had the record; a reason says why it never will.
    `digest` is that of the signed groups that earned the reward (hexadecimal); None: they can't be
    audited.
    """

    round: int
    stage: int
    peer_id: str
    reward: int
    winners: tuple[str, ...]
    earned_at: float
    reward_state: State
    reward_hash: str | None
    reward_sent_at: float | None
    reward_block: int | None
    reward_reason: str | None
    vote_state: State | None
    vote_hash: str | None
    vote_sent_at: float | None
    vote_block: int | None
    vote_reason: str | None
    digest: str | None = None

    def state(self, kind: Kind) -> State | None:
        return self.reward_state if kind == "reward" else self.vote_state

    def sent_at(self, kind: Kind) -> float | None:
        return self.reward_sent_at if kind == "reward" else self.vote_sent_at


class Ledger:
    """The ledger at `path`, created if missing. Safe for use by several threads and processes.

    Every method raises ResourceError, in one line, if the file can't be read or written (for
    example, if the disk is full); earlier records stay.
    """

    def __init__(self, path: Path) -> None:
        self._database = Database(path, _SCHEMA, "FULL")
        # Ledgers of versions before audits lack this column.
        self._database.ensure_column("ledger", "digest", "TEXT")

    def record(
        self,
        round: int,
        stage: int,
        peer_id: str,
        reward: int,
        winners: Sequence[str],
        digest: str | None = None,
    ) -> bool:
        """Write a reward and a vote to disk. `reward` in milli-rewards; no winners: no vote.

        Returns False if the row exists with other content: the first record is kept.
        """
        text = json.dumps(list(winners))
        vote_state = "earned" if winners else None
        self._database.execute(
            "INSERT INTO ledger (round, stage, peer_id, reward, winners, earned_at, reward_state,"
            " vote_state, digest) VALUES (?, ?, ?, ?, ?, ?, 'earned', ?, ?) ON CONFLICT DO NOTHING",
            (round, stage, peer_id, reward, text, time.time(), vote_state, digest),
        )
        (kept,) = self._database.execute(
            "SELECT reward, winners, digest FROM ledger WHERE round = ? AND stage = ? AND"
            " peer_id = ?",
            (round, stage, peer_id),
        )
        return kept == (reward, text, digest)

    def rows(self) -> list[Row]:
        """Return all rows, oldest round first."""
        return self._select("ORDER BY round, stage, peer_id")

    def unsettled(self) -> list[Row]:
        """Return rows with a reward or vote neither confirmed nor rejected, oldest round first."""
        return self._select(f"WHERE {_IS_UNSETTLED} ORDER BY round, stage, peer_id")

    def confirmed(self, limit: int) -> list[Row]:
        """Return `limit` rows with a confirmed reward or vote, those in the newest blocks first."""
        return self._select(
            "WHERE 'confirmed' IN (reward_state, vote_state) "
            "ORDER BY max(ifnull(reward_block, 0), ifnull(vote_block, 0)) DESC, round DESC LIMIT ?",
            (limit,),
        )

    def counts(self) -> dict[State, int]:
        """Return the number of rewards in each state."""
        found = self._database.execute(
            "SELECT reward_state, count(*) FROM ledger GROUP BY reward_state"
        )
        return dict.fromkeys(STATES, 0) | dict(found)

    def waiting(self) -> tuple[int, float | None]:
        """Return the number of unqueued rewards, and when the oldest was earned (Unix seconds)."""
        (found,) = self._database.execute(
            "SELECT count(*), min(earned_at) FROM ledger WHERE reward_state = 'earned'"
        )
        return found[0], found[1]

    def queue(self) -> None:
        """Queue all rewards and votes that were earned, to be sent now."""
        self._database.execute(
            "UPDATE ledger SET reward_state = iif(reward_state = 'earned', 'queued', reward_state),"
            " vote_state = iif(vote_state = 'earned', 'queued', vote_state) WHERE reward_state ="
            " 'earned' OR vote_state = 'earned'"
        )

    def requeue(
        self,
        row: Row,
        kind: Kind,
    ) -> None:
        """Queue a reward or vote that the chain does not have after all, to be sent again."""
        self._set(row, kind, "queued", {"block": None})

    def sent(
        self,
        row: Row,
        kind: Kind,
        tx_hash: str,
    ) -> None:
        """Record that the account service sent it."""
        self._set(row, kind, "sent", {"hash": tx_hash, "sent_at": time.time()})

    def confirm(
        self,
        row: Row,
        kind: Kind,
        block: int,
    ) -> None:
        """Record that the chain had it at `block`."""
        self._set(row, kind, "confirmed", {"block": block})

    def reject(
        self,
        row: Row,
        kind: Kind,
        reason: str,
    ) -> None:
        """Record that the chain will never have it, for this reason."""
        self._set(row, kind, "rejected", {"block": None, "reason": reason})

    def close(self) -> None:
        self._database.close()

    def _set(
        self,
        row: Row,
        kind: Kind,
        state: State,
        values: dict[str, object],
    ) -> None:
        changes = ", ".join(f"{kind}_{name} = ?" for name in ("state", *values))
        self._database.execute(
            f"UPDATE ledger SET {changes} WHERE round = ? AND stage = ? AND peer_id = ?",  # noqa: S608 - our own names
            (state, *values.values(), row.round, row.stage, row.peer_id),
        )

    def _select(
        self,
        clause: str,
        parameters: Sequence[object] = (),
    ) -> list[Row]:
        found = self._database.execute(f"SELECT * FROM ledger {clause}", parameters)  # noqa: S608 - our own clauses
        return [
            Row(round, stage, peer_id, reward, tuple(json.loads(winners)), *rest)
            for round, stage, peer_id, reward, winners, *rest in found
        ]
