"""The durable record of a node's bets: one row per clue, on disk (fsync) before a bet is sent.

    skipped -> planned -> sent -> confirmed -> claiming -> paid, or lost
                               -> missed (reason)

A new row is `skipped`, from before the model is asked until there is a bet. A row becomes
`confirmed`, `claiming`, `paid` or `lost` only by what the chain shows.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from worker.chain.database import Database
from worker.records import BetState

OPEN_STATES = ("planned", "sent", "confirmed", "claiming")
UNKNOWN_FAMILY = "unknown"
"""Name of the family for questions of a judge that does not name it."""
_MAX_FAMILIES = 64
"""Number of families to report, because a foreign judge may name any number."""

_FIRST_SCHEMA = """
    CREATE TABLE IF NOT EXISTS bets (
        market TEXT NOT NULL, game INTEGER NOT NULL, round INTEGER NOT NULL, block INTEGER NOT NULL,
        choice INTEGER NOT NULL, amount TEXT NOT NULL, beliefs TEXT NOT NULL, state TEXT NOT NULL,
        changed_at REAL NOT NULL, reason TEXT, brier REAL, family TEXT,
        PRIMARY KEY (market, game, round)
    ) STRICT, WITHOUT ROWID;
"""
_GAMES_WITH_THE_SAME_NUMBER = (
    "ALTER TABLE bets RENAME TO earlier",
    """
    CREATE TABLE bets (
        market TEXT NOT NULL, game INTEGER NOT NULL, round INTEGER NOT NULL, block INTEGER NOT NULL,
        choice INTEGER NOT NULL, amount TEXT NOT NULL, beliefs TEXT NOT NULL, state TEXT NOT NULL,
        changed_at REAL NOT NULL, reason TEXT, brier REAL, family TEXT, creation TEXT NOT NULL,
        asked_at REAL NOT NULL, PRIMARY KEY (market, game, round, creation)
    ) STRICT, WITHOUT ROWID
    """,
    "INSERT INTO bets SELECT market, game, round, block, choice, amount, beliefs, state,"
    " changed_at, reason, brier, family, '', changed_at FROM earlier",
    "DROP TABLE earlier",
)
_RECORD_IN_THE_JOURNAL = (
    "ALTER TABLE bets ADD COLUMN answer TEXT NOT NULL DEFAULT ''",
    "CREATE TABLE lines (number INTEGER PRIMARY KEY, line TEXT NOT NULL) STRICT",
)
_MIGRATIONS = (_GAMES_WITH_THE_SAME_NUMBER, _RECORD_IN_THE_JOURNAL)
"""Migrations of the database. Never change a released one: append another."""
_THE_ROW = " WHERE market = ? AND game = ? AND round = ? AND creation = ?"


@dataclass(frozen=True, slots=True)
class Row:
    """A clue and our bet on it. `amount` in units of a token; `changed_at` in Unix seconds.

    `block`: the newest block when the row was written; the bet is in a later one. `beliefs`: the
    model's probabilities, empty if it was not asked. `brier`: their score; None: the answer is
    unknown. `family`: the question's task family, as the judge names it; None: it does not.
    `creation`: the transaction that opened the game, because a chain that was restored to before it
    may give its number to another game; empty: unknown. `asked_at`: when the clue was read, in Unix
    seconds. `answer`: the text of the choice, for people; empty: unknown.
    """

    market: str
    game: int
    round: int
    block: int
    choice: int
    amount: int
    beliefs: tuple[float, ...]
    state: BetState
    changed_at: float
    reason: str | None = None
    brier: float | None = None
    family: str | None = None
    creation: str = ""
    asked_at: float = 0.0
    answer: str = ""

    @property
    def key(self) -> tuple[str, int, int, str]:
        return self.market, self.game, self.round, self.creation


class Journal:
    """The journal at `path`. Every method may raise ResourceError."""

    def __init__(self, path: Path) -> None:
        self._database = Database(path, _FIRST_SCHEMA, "FULL")
        self._database.ensure_column("bets", "family", "TEXT")
        self._database.migrate(_MIGRATIONS)

    def add(self, row: Row) -> None:
        """Write a new row; if the clue has a row already, keep that."""
        beliefs = json.dumps(list(row.beliefs))
        self._database.execute(
            "INSERT INTO bets VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO NOTHING",
            (
                row.market,
                row.game,
                row.round,
                row.block,
                row.choice,
                str(row.amount),
                beliefs,
                row.state,
                row.changed_at,
                row.reason,
                row.brier,
                row.family,
                row.creation,
                row.asked_at,
                row.answer,
            ),
        )

    def decide(self, row: Row, line: str | None = None) -> None:
        """Write the decision on a clue, whose row was added before the model was asked.

        `line`: a line for the record, as in `move`.
        """
        self._update(
            row,
            line,
            choice=row.choice,
            amount=str(row.amount),
            beliefs=json.dumps(list(row.beliefs)),
            state=row.state,
            changed_at=row.changed_at,
            reason=row.reason,
            answer=row.answer,
        )

    def has(
        self,
        market: str,
        game: int,
        round: int,
        creation: str,
    ) -> bool:
        """Return whether the clue has a row; an unknown creation equals any other."""
        found = self._database.execute(
            "SELECT 1 FROM bets WHERE market = ? AND game = ? AND round = ?"
            " AND (creation IN (?, '') OR ? = '')",
            (market, game, round, creation, creation),
        )
        return bool(found)

    def open_rows(self, market: str) -> list[Row]:
        """Return the rows of a market that the chain has not settled, oldest first."""
        marks = ", ".join("?" * len(OPEN_STATES))
        return self._rows(f"state IN ({marks}) ORDER BY game, round", market, *OPEN_STATES)

    def ended_rows(
        self,
        market: str,
        since: float,
        limit: int,
    ) -> list[Row]:
        """Return the rows that were paid or lost, by the contract, since then; newest first.

        Rows that were given up, which have a reason, are left out.
        """
        condition = "(state = 'paid' OR (state = 'lost' AND reason IS NULL)) AND changed_at >= ?"
        return self._rows(f"{condition} ORDER BY changed_at DESC LIMIT ?", market, since, limit)

    def unrated_rows(self, market: str, since: float) -> list[Row]:
        """Return the rows without a bet, asked about since then, whose beliefs have no score."""
        condition = "state IN ('skipped', 'missed') AND brier IS NULL AND beliefs != '[]'"
        return self._rows(f"{condition} AND asked_at >= ?", market, since)

    def _rows(self, condition: str, market: str, *values: object) -> list[Row]:
        found = self._database.execute(
            f"SELECT * FROM bets WHERE market = ? AND {condition}",  # noqa: S608 - of this module
            (market, *values),
        )
        return [
            Row(market, game, round, block, choice, int(amount), tuple(json.loads(beliefs)), *rest)
            for market, game, round, block, choice, amount, beliefs, *rest in found
        ]

    def state_of(self, row: Row) -> BetState:
        """Return the row's state now."""
        statement = f"SELECT state FROM bets{_THE_ROW}"  # noqa: S608 - names in this module
        ((state,),) = self._database.execute(statement, row.key)
        return cast(BetState, state)

    def has_other(self, row: Row, state: BetState) -> bool:
        """Return whether another row of the same game is in this state."""
        found = self._database.execute(
            "SELECT 1 FROM bets WHERE market = ? AND game = ? AND round != ? AND creation = ?"
            " AND state = ?",
            (*row.key, state),
        )
        return bool(found)

    def move(
        self,
        row: Row,
        state: BetState,
        reason: str | None = None,
        line: str | None = None,
    ) -> None:
        """Move the row to a state. `line`: for the record, which gets it once; None: no line."""
        self._update(row, line, state=state, changed_at=time.time(), reason=reason)

    def note(self, row: Row, reason: str) -> None:
        """Note the reason why a row's state does not change."""
        self._update(row, reason=reason)

    def rate(self, row: Row, brier: float) -> None:
        """Note the score of the row's beliefs."""
        self._update(row, brier=brier)

    def _update(self, row: Row, line: str | None = None, **values: object) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._database.transaction() as run:
            run(f"UPDATE bets SET {columns}{_THE_ROW}", (*values.values(), *row.key))  # noqa: S608 - names in this module
            if line is not None:
                run("INSERT INTO lines (line) VALUES (?)", (line,))

    def lines(self) -> list[tuple[int, str]]:
        """Return the lines that may not be in the record yet, with their numbers."""
        return [
            (number, line)
            for number, line in self._database.execute("SELECT * FROM lines ORDER BY number")
        ]

    def drop_line(self, number: int) -> None:
        """Forget a line that is in the record."""
        self._database.execute("DELETE FROM lines WHERE number = ?", (number,))

    def mean_brier(self) -> tuple[int, float | None]:
        """Return the number of rated rows, and their mean score; None without any."""
        ((count, mean),) = self._database.execute("SELECT count(brier), avg(brier) FROM bets")
        return int(count), mean

    def brier_by_family(self) -> dict[str, float]:
        """Return the mean score of rated rows by family, for the families with the most rows."""
        return dict(
            self._database.execute(
                "SELECT coalesce(family, ?), avg(brier) FROM bets WHERE brier IS NOT NULL"
                " GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT ?",
                (UNKNOWN_FAMILY, _MAX_FAMILIES),
            )
        )

    def counts(self) -> dict[str, int]:
        """Return the number of rows in each state."""
        return dict(self._database.execute("SELECT state, count(*) FROM bets GROUP BY state"))

    def num_open(self) -> int:
        """Return the number of rows that the chain has not settled."""
        counts = self.counts()
        return sum(counts.get(state, 0) for state in OPEN_STATES)

    def close(self) -> None:
        self._database.close()
