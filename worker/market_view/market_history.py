"""Read a prediction market's games from its log, once, and the questions from its judge.

Anyone may run a contract and a judge, so the stored data is limited, and the judge's texts are used
only where they fit the contract's game. After an error the old data stays, with the error next to
it.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from worker.chain.coordinator import Coordinator, Event
from worker.chain.market import TOKEN, GameStatus, Market
from worker.errors import WorkerError
from worker.log import discreet, printable
from worker.market.judge_client import JudgeClient
from worker.market_view.games import Bet, Game, GameState, Standing, standings
from worker.multiaddr import is_recorded_id
from worker.runtime.outage import Outage
from worker.settings import Settings

log = logging.getLogger(__name__)

MAX_GAMES = 50
MAX_BETS = 1000
"""Number of bets and claims of a game that are kept, and of peers whose balance is read."""
MAX_ROUNDS = 1000
"""Number of ends of rounds of a game that are kept."""
_PIECE_BLOCKS = 2000
"""Number of blocks of the log per request; after an error they are read again."""
_EVENTS = ("NewGameCreated", "RoundIncremented", "NewGuess", "AnswerRevealed", "RewardClaimed")
_OUR_EVENTS = (*_EVENTS, "GameCancelled")
_STATES: dict[GameStatus, GameState] = {
    GameStatus.OPEN: "open",
    GameStatus.CLOSED: "closed",
    GameStatus.SETTLED: "settled",
    GameStatus.CANCELLED: "cancelled",
}
_MAX_ERROR = 256
_MAX_CHOICES = 64
_JUDGE_SECONDS = 5.0
"""Shortest time between two requests to the judge."""


@dataclass(slots=True)
class _Log:
    """The log as far as it was read. `newest`: the last block, with its hash. None: nothing yet.

    `balances_at`: the block and the day of the balances.
    """

    games: dict[int, Game] = field(default_factory=dict)
    newest: tuple[int, str | None] | None = None
    next_block: int | None = None
    balances: dict[str, float] = field(default_factory=dict)
    balances_at: tuple[int, int] | None = None


@dataclass(slots=True)
class View:
    """The market for a page: `games` newest first. Times are Unix times; None: never read.

    `contract` None: the swarm has no market, as far as known. `judge_error` also if it has no URL.
    """

    contract: str | None
    games: list[Game]
    standings: list[Standing]
    updated_at: float | None
    error: str | None
    judge_at: float | None
    judge_error: str | None


class History:
    """The market of these settings: `look` reads what is new, `view` returns what is known.

    Safe for use by several threads; of two that `look` at once, the second waits for the first.
    """

    def __init__(self, settings: Settings, coordinator: Callable[[], Coordinator]) -> None:
        self._settings = settings.market
        self._coordinator = coordinator
        url = settings.market.judge_url
        self._judge = None if url is None else JudgeClient(url)
        self._lock = threading.Lock()
        self._outage = Outage(log)
        self._log = _Log()
        self._contract: str | None = None
        self._market: Market | None = None
        self._updated_at: float | None = None
        self._error: str | None = None
        self._asked_at = 0.0
        self._judge_at: float | None = None
        self._judge_error = None if self._judge else "market.judge_url is not set"

    def look(self, max_age: float = 0.0) -> None:
        """Read what is new, unless it was read in the last `max_age` seconds."""
        with self._lock:
            if self._updated_at is not None and time.time() - self._updated_at < max_age:
                return
            try:
                market = self._locate()
                if market is not None:
                    self._read(market)
            except WorkerError as error:
                self._error = printable(discreet(str(error)))[:_MAX_ERROR]
                self._outage.begin("prediction market can't be read error=%s", self._error)
                return
            self._error, self._updated_at = None, time.time()
            self._outage.end("prediction market can be read again")
            if market is not None and self._judge is not None:
                self._ask(self._judge)

    def view(self) -> View:
        with self._lock:
            kept = sorted(self._log.games.items(), reverse=True)
            games = [_copy(game) for _, game in kept]
            rows = standings(games)
            for row in rows:
                row.balance = self._log.balances.get(row.peer_id)
            return View(
                self._contract,
                games,
                rows,
                self._updated_at,
                self._error,
                self._judge_at,
                self._judge_error,
            )

    def balances_of(self, peer_ids: list[str]) -> dict[str, float]:
        """Return the bet tokens of these peers now; empty without a market.

        Raises ChainUnreachable and ChainError.
        """
        with self._lock:
            market = self._locate()
        if market is None:
            return {}
        return {peer_id: market.balance(peer_id) / TOKEN for peer_id in peer_ids}

    # ---- the chain

    def _locate(self) -> Market | None:
        if self._settings.enabled is False:
            return None
        coordinator = self._coordinator()
        coordinator.ensure_checked()
        address = self._settings.contract or coordinator.deployment.market
        if address is None:
            return None
        if self._contract != address:
            self._log, self._contract = _Log(), address
        if self._market is None or self._market.client is not coordinator:
            self._market = None
        if self._market is None or self._market.address != address:
            self._market = Market(coordinator, address)
        return self._market

    def _read(self, market: Market) -> None:
        newest = market.client.block_number()
        if self._log.newest is not None and self._is_another_chain(market, newest):
            log.warning("the chain was reset or reorganised: reading the market again")
            self._log = _Log()
        found = self._log
        if found.newest is None or found.newest[0] != newest:
            block_hash = market.client.block_hash(newest)
            if found.next_block is None:
                found.next_block = _first_block(market)
            for first in range(found.next_block, newest + 1, _PIECE_BLOCKS):
                last = min(first + _PIECE_BLOCKS - 1, newest)
                self._read_piece(market, first, last)
                found.next_block = last + 1
            found.newest = newest, block_hash
        if market.version is not None:
            self._read_states(market)
            self._read_returned(market)
        self._read_balances(market, newest)

    def _is_another_chain(self, market: Market, newest: int) -> bool:
        block, block_hash = self._log.newest or (0, None)
        return newest < block or market.client.block_hash(block) != block_hash

    def _read_piece(self, market: Market, first: int, last: int) -> None:
        """Read a whole piece before any of it is used: after an error the piece is read again."""
        block_time = functools.cache(market.client.block_time)
        entries = []
        for name in _EVENTS if market.version is None else _OUR_EVENTS:
            for event in market.events(name, {}, first, last):
                shares = _shares(market, event) if name == "NewGuess" else None
                entries.append((event, block_time(event.block), shares))
        for event, at, shares in entries:
            self._take(event, at, shares)
        for number in sorted(self._log.games)[:-MAX_GAMES]:
            del self._log.games[number]

    def _take(self, event: Event, at: float, shares: float | None) -> None:
        said, games = event.arguments, self._log.games
        number = said["gameIdx"]
        if event.name == "NewGameCreated":
            if 1 < said["choiceCount"] <= _MAX_CHOICES:
                games[number] = Game(number, said["roundCount"], said["choiceCount"], at)
            return
        game = games.get(number)
        if game is None or not is_recorded_id(said.get("peerId", "")):
            return
        if event.name == "RoundIncremented":
            if len(game.round_ends) < min(game.num_rounds, MAX_ROUNDS):
                game.round_ends.append(at)
            game.state = "closed" if len(game.round_ends) >= game.num_rounds else "open"
        elif event.name == "AnswerRevealed":
            right = said["correctChoiceIdx"]
            game.state, game.ended_at = "settled", at
            game.right_choice = right if right < game.num_choices else None
        elif event.name == "GameCancelled":
            game.state, game.ended_at = "cancelled", at
        elif event.name == "RewardClaimed":
            if said["peerId"] in game.paid or len(game.paid) < MAX_BETS:
                game.paid[said["peerId"]] = said["betTokensOut"] / TOKEN
        else:
            _add_bet(game, said, at, shares)

    def _read_states(self, market: Market) -> None:
        """Read games in progress: a game whose judge is gone is cancelled without an event."""
        for game in self._log.games.values():
            if not game.is_over:
                now = market.game(game.number)
                game.state = _STATES.get(now.status, game.state)
                if game.state == "cancelled":
                    game.ended_at = float(now.deadline)

    def _read_returned(self, market: Market) -> None:
        """Read once the share of wrong bets that a settled game returns; the rules differ."""
        for game in self._log.games.values():
            if game.right_choice is None or game.returned is not None or game.num_omitted:
                continue
            for peer_id, stake in game.wrong_stakes().items():
                payout, _ = market.payout(game.number, peer_id)
                game.returned = payout / TOKEN / stake
                break

    def _read_balances(self, market: Market, newest: int) -> None:
        """Read the balances of peers that bet, when they may have changed."""
        now = newest, int(time.time() // 86400)
        if self._log.balances_at == now:
            return
        rows = standings(list(self._log.games.values()))[:MAX_BETS]
        self._log.balances = {row.peer_id: market.balance(row.peer_id) / TOKEN for row in rows}
        self._log.balances_at = now

    # ---- the judge

    def _ask(self, judge: JudgeClient) -> None:
        """Read the questions of games whose texts are unknown, if there are any."""
        if time.time() - self._asked_at < _JUDGE_SECONDS:
            return
        self._asked_at = time.time()
        games = self._log.games.values()
        try:
            if any(not game.is_over for game in games):
                clue = judge.clue()
                if clue.is_open:
                    self._word(clue.game_id, clue.family, clue.clue, tuple(clue.choices))
            if any(game.is_over and not game.is_whole for game in games):
                for past in judge.past_games():
                    self._word(past.game, past.family, past.clues[-1], past.choices, True)
        except WorkerError as error:
            self._judge_error = printable(discreet(str(error)))[:_MAX_ERROR]
        else:
            self._judge_at, self._judge_error = time.time(), None

    def _word(
        self,
        number: int,
        family: str | None,
        question: str,
        choices: tuple[str, ...],
        is_whole: bool = False,
    ) -> None:
        game = self._log.games.get(number)
        if game is not None and game.num_choices == len(choices):
            game.family, game.question, game.choices = family or "", question, choices
            game.is_whole = is_whole


def _copy(game: Game) -> Game:
    """Return a game that later reading does not change."""
    return replace(
        game, round_ends=list(game.round_ends), bets=list(game.bets), paid=dict(game.paid)
    )


def _add_bet(game: Game, said: Mapping[str, Any], at: float, shares: float | None) -> None:
    if len(game.bets) >= MAX_BETS:
        game.num_omitted += 1
    elif said["choiceIdx"] < game.num_choices:
        amount = said["bet"] / TOKEN
        choice = said["choiceIdx"]
        game.bets.append(Bet(said["peerId"], said["roundIdx"], choice, amount, shares, at))


def _first_block(market: Market) -> int:
    """Return the first block of the log of the games that are kept."""
    first = market.client.first_block()
    if market.version is None or (number := market.num_games() - MAX_GAMES) <= 0:
        return first
    opened = market.events("NewGameCreated", {"gameIdx": number}, first, newest_first=True)
    event = next(opened, None)
    return first if event is None else event.block


def _shares(market: Market, event: Event) -> float | None:
    """Return the shares that a bet bought; None: the contract does not tell."""
    if market.version is None:
        return None
    said = event.arguments
    guess = market.guess_of(said["gameIdx"], said["peerId"], said["roundIdx"], event.block)
    return None if guess is None else guess.shares / TOKEN
