"""The page about the prediction market for a person's own nodes."""

import time
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from worker.account.accounts import Account, Node
from worker.account.site import Site, Visitor
from worker.errors import WorkerError
from worker.market_view.games import Bet, Game
from worker.swarm.identity import animal_name

MAX_AGE_SECONDS = 3.0
"""Seconds after which the chain is read again for a page."""
_MAX_GAMES, _MAX_NODES = 10, 200


@dataclass(frozen=True, slots=True)
class NodeLine:
    """A node's totals over the known games. `balance`: bet tokens; None: not read."""

    node: Node
    balance: float | None
    num_bets: int
    num_won: int
    num_open: int
    staked: float
    paid: float


class MarketPages:
    """`/market`."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def add_to(self, application: web.Application) -> None:
        application.router.add_get("/market", self._site.signed_in(self.market))

    async def market(
        self,
        request: web.Request,
        visitor: Visitor,
    ) -> web.Response:
        content = await self._site.in_thread(self._content, visitor.account)
        return self._site.page(request, "market.html", visitor, **content)

    def _content(self, account: Account) -> dict[str, Any]:
        """Read the market, and return the values of the page."""
        history = self._site.market
        history.look(MAX_AGE_SECONDS)
        view = history.view()
        nodes = list(self._site.accounts.nodes_of(account))
        own = {node.peer_id: node.name for node in nodes}
        try:
            balances = history.balances_of(list(own)[:_MAX_NODES])
        except WorkerError:
            balances = {}  # the page says that the chain does not answer
        played = [(game, _bets_of(game, own)) for game in view.games]
        names = {row.peer_id: animal_name(row.peer_id) for row in view.standings}
        return {
            "view": view,
            "now": time.time() if view.error is None else view.updated_at or 0.0,
            "rows": [_line(node, balances.get(node.peer_id), view.games) for node in nodes],
            "played": [(game, bets) for game, bets in played if bets][:_MAX_GAMES],
            "names": names | own,
        }


def _bets_of(game: Game, own: dict[str, str]) -> list[Bet]:
    return [bet for bet in game.bets if bet.peer_id in own]


def _line(
    node: Node,
    balance: float | None,
    games: list[Game],
) -> NodeLine:
    results: list[str] = []
    staked = paid = 0.0
    for game in games:
        bets = [bet for bet in game.bets if bet.peer_id == node.peer_id]
        results += [game.result_of(bet) for bet in bets]
        staked += sum(bet.amount for bet in bets)
        paid += game.paid.get(node.peer_id, 0.0)
    won, still_open = results.count("won"), results.count("open")
    return NodeLine(node, balance, len(results), won, still_open, staked, paid)
