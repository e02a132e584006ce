"""Queries of the store, for the pages. Each result is limited, however long the history is."""

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from worker.dashboard.store import SPAN_ROUNDS

MAX_POINTS = 400
"""Largest number of points of a curve; more rounds than that are averaged."""
PAGE_ROWS = 50
_MAX_SEARCH = 100

Row = Mapping[str, Any]
SORTS = {
    "total": "total",
    "audited": "audited",
    "last": "last_reward",
    "round": "last_round",
    "wins": "wins",
    "voted": "last_vote",
    "name": "name",
}
"""Columns that peers can be sorted by."""


@dataclass(frozen=True, slots=True)
class Part:
    """A page of a table: `rows` are those of page `number` (0: the first) of `total` rows."""

    rows: Sequence[Row]
    number: int
    total: int

    @property
    def num_pages(self) -> int:
        return max(1, -(-self.total // PAGE_ROWS))


def _rows(
    connection: sqlite3.Connection, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()
) -> list[Row]:
    return [dict(row) for row in connection.execute(statement, values)]


def _part(
    connection: sqlite3.Connection,
    source: str,
    order: str,
    values: Mapping[str, Any],
    number: int,
) -> Part:
    """Return page `number` of the rows of `source` in an order; the last one if it has fewer.

    Both are parts of statements in this module; they never contain untrusted text.
    """
    total = connection.execute(f"SELECT count(*) FROM {source}", values).fetchone()[0]  # noqa: S608
    number = max(0, min(number, -(-total // PAGE_ROWS) - 1))
    limits = {"most": PAGE_ROWS, "skipped": number * PAGE_ROWS}
    statement = f"SELECT * FROM {source} ORDER BY {order} LIMIT :most OFFSET :skipped"  # noqa: S608
    return Part(_rows(connection, statement, {**values, **limits}), number, total)


# ---- rounds


def num_peers(connection: sqlite3.Connection) -> int:
    """Return the number of peers that were ever seen."""
    return int(connection.execute("SELECT count(*) FROM peers").fetchone()[0])


def last_rounds(connection: sqlite3.Connection, most: int) -> list[Row]:
    """Return the newest rounds, newest first: `round`, `mean` and `peers`."""
    return _rows(
        connection,
        "SELECT number AS round, total * 1.0 / num_peers AS mean, num_peers AS peers FROM rounds"
        " ORDER BY number DESC LIMIT ?",
        (most,),
    )


def round_curve(connection: sqlite3.Connection) -> dict[str, list[float]]:
    """Return the curve of all rounds: `round`, `mean` and `peers`, at most MAX_POINTS of each."""
    width = _width(connection.execute("SELECT min(number), max(number) FROM rounds").fetchone())
    rows = connection.execute(
        "SELECT min(number), total(total) / total(num_peers), max(num_peers) FROM rounds"
        " GROUP BY number / ? ORDER BY 1",
        (width,),
    ).fetchall()
    return _columns(("round", "mean", "peers"), rows)


def curves(connection: sqlite3.Connection, kind: str) -> dict[str, Any]:
    """Return the curves whose names begin with KIND/: `round`, and `series` by name.

    A series has null where a name has no figure.
    """
    bounds = kind + "/", kind + "0"  # "0" follows "/"
    named = "FROM curves WHERE name >= ? AND name < ? AND width = ?"
    limits = f"SELECT min(round), max(round) {named}"
    spans = connection.execute(limits, (*bounds, SPAN_ROUNDS)).fetchone()
    recent = connection.execute(limits, (*bounds, 1)).fetchone()
    is_short = spans[0] is None or spans[0] // SPAN_ROUNDS == (recent[0] or 0) // SPAN_ROUNDS
    stored = 1 if is_short else SPAN_ROUNDS
    width = _width(recent if is_short else spans)
    rows = connection.execute(
        f"SELECT name, round / ? * ?, total(total) / total(num) {named} GROUP BY 1, 2",
        (width, width, *bounds, stored),
    ).fetchall()
    rounds = sorted({row[1] for row in rows})
    place = {number: index for index, number in enumerate(rounds)}
    series: dict[str, list[float | None]] = {}
    for name, number, value in rows:
        values = series.setdefault(name.partition("/")[2], [None] * len(rounds))
        values[place[number]] = value
    return {"round": rounds, "series": series}


def newest_figures(connection: sqlite3.Connection, kind: str) -> list[Row]:
    """Return the newest figure of each curve KIND/NAME: `name`, `round` and `value`."""
    return _rows(
        connection,
        "SELECT substr(name, instr(name, '/') + 1) AS name, max(round) AS round,"
        " total / num AS value FROM curves WHERE name >= ? AND name < ? AND width = 1"
        " GROUP BY curves.name",
        (kind + "/", kind + "0"),
    )


# ---- peers


def peers(
    connection: sqlite3.Connection,
    sort: str,
    is_ascending: bool,
    search: str,
    number: int,
    ranked_by: str,
) -> Part:
    """Return a page of the peers whose name, id or account contains `search`."""
    column = SORTS.get(sort, "total")
    direction = "ASC" if is_ascending else "DESC"
    rank = "audited" if ranked_by == "audited_reward" else "total"
    pattern = search[:_MAX_SEARCH].replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
    # The names of columns come from SORTS.
    source = f"""
        (SELECT *, row_number() OVER (ORDER BY coalesce({rank}, 0) DESC, peer_id) AS rank
        FROM peers) WHERE name LIKE :search ESCAPE '\\' OR peer_id LIKE :search ESCAPE '\\'
        OR account LIKE :search ESCAPE '\\'
    """  # noqa: S608
    order = f"{column} IS NULL, {column} {direction}, rank"
    return _part(connection, source, order, {"search": f"%{pattern}%"}, number)


def peer(connection: sqlite3.Connection, peer_id: str) -> Row | None:
    """Return a peer; None if it was never seen."""
    rows = _rows(connection, "SELECT * FROM peers WHERE peer_id = ?", (peer_id,))
    return rows[0] if rows else None


def last_rewards(
    connection: sqlite3.Connection, numbers: Sequence[int], since: int
) -> dict[int, list[tuple[int, int]]]:
    """Return for each peer, by its number, its rewards from round `since` on, oldest first."""
    found: dict[int, list[tuple[int, int]]] = {number: [] for number in numbers}
    places = ", ".join("?" * len(numbers))
    rows = connection.execute(
        f"SELECT peer, round, sum(reward) FROM rewards WHERE peer IN ({places}) AND round >= ?"  # noqa: S608
        " GROUP BY 1, 2 ORDER BY 2",
        (*numbers, since),
    )
    for number, round, reward in rows:
        found[number].append((round, reward))
    return found


def peer_curve(connection: sqlite3.Connection, number: int) -> dict[str, list[float]]:
    """Return a peer's mean reward by round: sums of spans first, then each of the newest rounds."""
    first_recent = connection.execute(
        "SELECT coalesce(min(round), 0) FROM rewards WHERE peer = ?", (number,)
    ).fetchone()[0]
    limits = connection.execute(
        "SELECT min(span), max(span) FROM spans WHERE peer = ?", (number,)
    ).fetchone()
    width = _width(limits)
    older = connection.execute(
        "SELECT min(span) * ? AS round, total(total) / total(num) FROM spans"
        " WHERE peer = ? AND (span + 1) * ? <= ? GROUP BY span / ? ORDER BY 1",
        (SPAN_ROUNDS, number, SPAN_ROUNDS, first_recent, width),
    ).fetchall()
    newer = connection.execute(
        "SELECT round, sum(reward) FROM rewards WHERE peer = ? GROUP BY 1 ORDER BY 1", (number,)
    ).fetchall()
    return _columns(("round", "mean"), [*older, *newer])


# ---- transactions and events


def transactions(
    connection: sqlite3.Connection, number: int, peer: int | None = None, kind: str = ""
) -> Part:
    """Return a page of the newest transactions, of a peer and of a kind if those are given."""
    source = "transactions"
    if peer is not None:
        source += " WHERE peer = :peer"
    elif kind:
        source += " WHERE kind = :kind"
    part = _part(connection, source, "block DESC, rowid DESC", {"peer": peer, "kind": kind}, number)
    return replace(part, rows=[_named(connection, row) for row in part.rows])


def _named(connection: sqlite3.Connection, row: Row) -> Row:
    """Return a transaction with the time of its block and the id and name of its peer."""
    at = connection.execute("SELECT at FROM times WHERE block = ?", (row["block"],)).fetchone()
    peer = connection.execute(
        "SELECT peer_id, name FROM peers WHERE number = ?", (row["peer"],)
    ).fetchone()
    peer_id, name = (None, None) if peer is None else peer
    return {**row, "at": None if at is None else at[0], "peer_id": peer_id, "name": name}


def events(connection: sqlite3.Connection, number: int, kinds: Sequence[str]) -> Part:
    """Return a page of the newest events of these kinds."""
    wanted = {f"kind{index}": kind for index, kind in enumerate(kinds)}
    places = ", ".join(f":{name}" for name in wanted)
    return _part(
        connection, f"events WHERE kind IN ({places})", "at DESC, rowid DESC", wanted, number
    )


def _width(limits: Sequence[int | None]) -> int:
    """Return the number of rounds (or spans) per point of a curve from limits[0] to limits[1]."""
    first, last = limits
    if first is None or last is None:
        return 1
    return max(1, -(-(last - first + 1) // (MAX_POINTS - 1)))


def _columns(names: Sequence[str], rows: Sequence[Any]) -> dict[str, list[float]]:
    return {name: [row[index] for row in rows] for index, name in enumerate(names)}
