"""The page about the prediction market."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from worker.chain.coordinator import Coordinator
from worker.log import printable
from worker.market_view.games import Game
from worker.market_view.market_history import History, View
from worker.settings import Settings
from worker.swarm.identity import animal_name

NUM_CARDS = 6
"""Number of games shown in full; older ones are rows of a table."""
NUM_ROWS = 100
"""Number of peers shown."""


class MarketPage:
    """The content of the page, and the same as JSON, encoded once per look, not per request."""

    def __init__(self, settings: Settings, coordinator: Callable[[], Coordinator]) -> None:
        self._history = History(settings, coordinator)
        self._view = self._history.view()
        self.data = json.dumps(_told(self._view)).encode()

    def look(self) -> None:
        """Read what is new."""
        self._history.look()
        self._view = self._history.view()
        self.data = json.dumps(_told(self._view)).encode()

    def content(self) -> dict[str, Any]:
        """Return the values of the page's template."""
        view = self._view
        is_now = view.error is None or view.updated_at is None
        return {
            "view": view,
            "now": time.time() if is_now else view.updated_at,
            "names": {row.peer_id: animal_name(row.peer_id) for row in view.standings},
            "num_cards": NUM_CARDS,
            "num_rows": NUM_ROWS,
        }


def _told(view: View) -> dict[str, Any]:
    """Return the answer of /api/market, described in docs/prediction-market.md."""
    told = asdict(view)
    told["games"] = [_told_game(game) for game in view.games]
    for row in told["standings"]:
        row["name"] = animal_name(row["peer_id"])
        row["peer_id"] = printable(row["peer_id"])
    return told


def _told_game(game: Game) -> dict[str, Any]:
    results = [game.result_of(bet) for bet in game.bets]
    told = asdict(game) | {"beliefs": game.beliefs(), "pot": game.pot}
    for bet, result in zip(told["bets"], results, strict=True):
        bet["result"] = result
    return told
