"""The content of each page, from the reader, the store, the fleet and the answers on this machine.

Functions run in threads. `asked` has the values of a request's query; they are untrusted.
"""

import itertools
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worker.dashboard import history
from worker.dashboard.fleet_view import FleetView
from worker.dashboard.history import Part
from worker.dashboard.reader import Reader
from worker.dashboard.store import Store, reading
from worker.errors import WorkerError
from worker.log import printable
from worker.runtime.state_dir import StateDir
from worker.settings import Settings
from worker.telemetry import answer_log

Asked = Mapping[str, str]
Content = Mapping[str, Any]

SPARK_ROUNDS = 24
FLEET_CURVES = ("family", "external", "rejected", "brier")
"""Kinds of curves that are made from nodes' figures."""
_TABLE_ROUNDS = 30
_BEST_PEERS = 10
_NUM_GROUPS = 20
_MAX_ANSWERS = 8
_MAX_TEXT = 600
"""Number of characters of a question or an answer that are shown."""
KINDS = {
    "RewardSubmitted": "reward",
    "WinnerSubmitted": "vote",
    "PeerRegistered": "registration",
    "RoundAdvanced": "round",
}
"""Kinds of transactions, by the contract's event."""


class Views:
    """The content of the pages. `fleet`: None if no targets are named."""

    def __init__(
        self, settings: Settings, reader: Reader, store: Store, fleet: FleetView | None
    ) -> None:
        self._settings = settings.dashboard
        self._reader = reader
        self._store = store
        self._fleet = fleet

    @contextmanager
    def _history(self) -> Iterator[sqlite3.Connection]:
        try:
            with reading(self._store.file) as connection:
                yield connection
        except sqlite3.Error as error:
            raise WorkerError(
                f"{self._store.file}: {error}; it is made again with the next block"
            ) from None

    @property
    def has_fleet(self) -> bool:
        return self._fleet is not None

    def shows_fleet(self, is_owner: bool) -> bool:
        """Return whether figures of nodes are shown to this visitor."""
        return self._fleet is not None and (self._settings.show_fleet or is_owner)

    # ---- pages

    def swarm(self, asked: Asked, is_owner: bool) -> Content:
        with self._history() as connection:
            rounds = history.last_rounds(connection, _TABLE_ROUNDS)
            best = self._peers(connection, "total", False, "", 0)
            figures = {
                kind: history.newest_figures(connection, kind)
                for kind in FLEET_CURVES
                if self.shows_fleet(is_owner)
            }
            num_peers = history.num_peers(connection)
        best["peers"] = best["peers"][:_BEST_PEERS]
        return {**best, "rounds": rounds, "num_peers": num_peers, "figures": figures}

    def peers(self, asked: Asked, is_owner: bool) -> Content:
        sort, is_ascending = asked.get("sort", "total"), asked.get("order") == "up"
        search = printable(asked.get("find", ""))[:100]
        if sort not in history.SORTS:
            sort = "total"
        with self._history() as connection:
            found = self._peers(connection, sort, is_ascending, search, _page(asked))
        return {**found, "sort": sort, "is_ascending": is_ascending, "find": search}

    def _peers(
        self,
        connection: sqlite3.Connection,
        sort: str,
        is_ascending: bool,
        search: str,
        number: int,
    ) -> dict[str, Any]:
        """Return a page of peers with their last rewards and verdicts."""
        part = history.peers(connection, sort, is_ascending, search, number, self._reader.ranked_by)
        since = (self._reader.round or 0) - SPARK_ROUNDS + 1
        rewards = history.last_rewards(connection, [row["number"] for row in part.rows], since)
        rows = [
            {
                **row,
                "shown_id": printable(row["peer_id"]),
                "spark": _spark(rewards[row["number"]], since),
                "verdicts": self._reader.verdicts_of(row["peer_id"]),
            }
            for row in part.rows
        ]
        return {"part": part, "peers": rows}

    def peer(self, asked: Asked, is_owner: bool) -> Content:
        peer_id = asked.get("id", "")
        with self._history() as connection:
            peer = history.peer(connection, peer_id)
            if peer is None:
                return {"peer": None, "peer_id": printable(peer_id)[:256]}
            number = peer["number"]
            transactions = history.transactions(connection, _page(asked), peer=number)
            rewards = history.last_rewards(connection, [number], 0)[number]
        return {
            "peer": {**peer, "shown_id": printable(peer_id)},
            "verdicts": self._reader.verdicts_of(peer_id),
            "rewards": rewards[::-1][:_TABLE_ROUNDS],
            "transactions": _shown(transactions),
            "part": transactions,
            "kinds": KINDS,
            "node": self._node_of(peer_id) if self.shows_fleet(is_owner) else None,
        }

    def _node_of(self, peer_id: str) -> Mapping[str, Any] | None:
        rows = [] if self._fleet is None else self._fleet.content()["processes"]
        return next((row for row in rows if row["peer_id"] == peer_id), None)

    def fleet(self, asked: Asked, is_owner: bool) -> Content:
        return {"fleet": None if self._fleet is None else self._fleet.content()}

    def chain(self, asked: Asked, is_owner: bool) -> Content:
        kind = asked.get("kind", "")
        kind = kind if kind in KINDS else ""
        with self._history() as connection:
            part = history.transactions(connection, _page(asked), kind=kind)
            errors = history.events(connection, 0, ["chain"]).rows[:20]
        rows = [] if self._fleet is None else self._fleet.content()["processes"]
        return {
            "transactions": _shown(part),
            "part": part,
            "kind": kind,
            "kinds": KINDS,
            "errors": errors,
            "queues": [row for row in rows if row["service"] == "account"]
            if self.shows_fleet(is_owner)
            else [],
            "now": time.time(),
            "ledgers": [row for row in rows if row["ledger"]] if self.shows_fleet(is_owner) else [],
        }

    def events(self, asked: Asked, is_owner: bool) -> Content:
        kinds = ["chain", "fleet"] if self.shows_fleet(is_owner) else ["chain"]
        with self._history() as connection:
            part = history.events(connection, _page(asked), kinds)
        return {"part": part, "events": part.rows}

    def answers(self, asked: Asked, is_owner: bool) -> Content:
        """Return the newest groups of the nodes on this machine, own and peers' in turn."""
        nodes = []
        for folder in self._settings.node_dirs:
            try:
                _require_readable(StateDir(folder).answers)
                groups, error = _sample(folder), None
            except WorkerError as failure:
                groups, error = [], str(failure)
            nodes.append({"name": folder.name, "groups": groups, "error": error})
        return {"nodes": nodes}

    # ---- curves

    def curve(self, asked: Asked, is_owner: bool) -> Mapping[str, Any] | None:
        """Return a curve: `round`, and `series` with names and values. None: no such curve."""
        kind = asked.get("of", "")
        with self._history() as connection:
            if kind == "rounds":
                found = history.round_curve(connection)
                series = [("mean reward", found["mean"]), ("peers", found["peers"])]
                return _curve(found["round"], series)
            if kind == "peer":
                peer = history.peer(connection, asked.get("id", ""))
                if peer is None:
                    return None
                found = history.peer_curve(connection, peer["number"])
                return _curve(found["round"], [("mean reward", found["mean"])])
            if kind in FLEET_CURVES and self.shows_fleet(is_owner):
                told = history.curves(connection, kind)
                return _curve(told["round"], sorted(told["series"].items()))
        return None


def _curve(rounds: Sequence[Any], series: Sequence[tuple[str, Sequence[Any]]]) -> dict[str, Any]:
    return {
        "round": rounds,
        "series": [{"name": name, "values": list(values)} for name, values in series],
    }


def _page(asked: Asked) -> int:
    text = asked.get("page", "0")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 7 else 0


def _shown(part: Part) -> list[dict[str, Any]]:
    """Return transactions without control characters in texts of others."""
    return [
        {
            **row,
            "detail": printable(row["detail"]),
            "shown_id": None if row["peer_id"] is None else printable(row["peer_id"]),
        }
        for row in part.rows
    ]


def _spark(rewards: Sequence[tuple[int, int]], first: int) -> str:
    """Return the path of a curve of rewards, 120 wide and 26 high; a round without one is a gap."""
    highest = max([1000, *(reward for _, reward in rewards)])
    pieces, before = [], None
    for round, reward in rewards:
        x = 3 + 114 * (round - first) / (SPARK_ROUNDS - 1)
        y = 23 - 20 * max(0, reward) / highest
        pieces.append(f"{'L' if before == round - 1 else 'M'}{x:.1f} {y:.1f}")
        before = round
    return " ".join(pieces)


def _require_readable(folder: Path) -> None:
    """Raise WorkerError unless this process can read the folder, which its unit may hide."""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise WorkerError(
            f"{folder}: not there, or not readable for this dashboard; the node makes it with its"
            " first round"
        )


def _sample(folder: Path) -> list[Mapping[str, Any]]:
    """Return groups of a node's newest rounds: as many own ones as peers', if there are enough."""
    newest = list(itertools.islice(answer_log.read(folder), 20 * _NUM_GROUPS))
    own = [group for group in newest if group.peer_id is None]
    others = [group for group in newest if group.peer_id is not None]
    half = _NUM_GROUPS // 2
    num_others = min(len(others), max(half, _NUM_GROUPS - len(own)))
    chosen = [*own[: _NUM_GROUPS - num_others], *others[:num_others]]
    return [_group(group) for group in sorted(chosen, key=lambda group: -group.round)]


def _group(group: answer_log.AnsweredGroup) -> Mapping[str, Any]:
    return {
        "round": group.round,
        "family": printable(group.family),
        "level": group.level,
        "peer_id": None if group.peer_id is None else printable(group.peer_id),
        "trained": group.trained,
        "mean": group.mean_reward,
        "question": _cut(group.question),
        "right": None if group.right is None else _cut(group.right),
        "answers": [
            {"text": _cut(answer.text), "reward": answer.reward}
            for answer in group.answers[:_MAX_ANSWERS]
        ],
    }


def _cut(text: str) -> str:
    """Return the beginning of a text of several lines, without other control characters."""
    return "\n".join(map(printable, text[:_MAX_TEXT].split("\n")))
