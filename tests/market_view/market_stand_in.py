"""A chain with a prediction market, in memory: what a contract of anybody may say."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from worker.chain.coordinator import Event
from worker.chain.market import TOKEN, Game, GameStatus, Guess
from worker.errors import ChainUnreachable

CONTRACT = "0x" + "A" * 40
SECONDS_PER_BLOCK = 10.0


@dataclass
class Chain:
    """Coordinator and market in one; `fail_at`: the request that gets no answer."""

    version: str | None = "hivewright/1"
    log: list[Event] = field(default_factory=list)
    states: dict[int, Game] = field(default_factory=dict)
    balances: dict[str, int] = field(default_factory=dict)
    shares: dict[str, int] = field(default_factory=dict)
    payouts: dict[str, int] = field(default_factory=dict)
    num_blocks: int = 1
    name: str = "first"
    fail_at: str | None = None
    asked: list[str] = field(default_factory=list)
    deployment: Any = field(default_factory=lambda: SimpleNamespace(market=CONTRACT))
    address: str = CONTRACT

    @property
    def client(self) -> "Chain":
        return self

    def happens(self, name: str, game: int, **arguments: object) -> None:
        """Add an event in a block of its own."""
        self.log.append(Event(name, {"gameIdx": game, **arguments}, self.num_blocks, "0x"))
        self.num_blocks += 1

    def opens(self, game: int, num_rounds: int = 2, num_choices: int = 2) -> None:
        self.happens("NewGameCreated", game, roundCount=num_rounds, choiceCount=num_choices)
        self.states[game] = Game(GameStatus.OPEN, 0, num_rounds, 0, 10**6)

    def bets(self, game: int, peer: str, choice: int = 0, tokens: int = 1, round: int = 0) -> None:
        units = tokens * TOKEN
        self.happens("NewGuess", game, peerId=peer, roundIdx=round, choiceIdx=choice, bet=units)

    # ---- the coordinator's interface

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if what == self.fail_at:
            raise ChainUnreachable(f"{what}: no answer of http://me:secret-word-77@rpc.example\x1b")

    def ensure_checked(self) -> None:
        self._ask("check")

    def block_number(self) -> int:
        self._ask("block_number")
        return self.num_blocks - 1

    def block_hash(self, block: int) -> str:
        return f"{self.name}-{block}"

    def block_time(self, block: int) -> float:
        self._ask("block_time")
        return 1000.0 + block * SECONDS_PER_BLOCK

    def first_block(self) -> int:
        return 0

    # ---- the market's

    def num_games(self) -> int:
        return len(self.states)

    def events(
        self,
        name: str,
        filters: dict[str, Any],
        first: int,
        last: int | None = None,
        *,
        newest_first: bool = False,
    ) -> Iterator[Event]:
        self._ask(f"{name} {first}-{last}")
        found = [
            event
            for event in self.log
            if event.name == name
            and first <= event.block <= (self.num_blocks if last is None else last)
            and filters.items() <= event.arguments.items()
        ]
        return iter(found[::-1] if newest_first else found)

    def guess_of(self, game: int, peer: str, round: int, block: int) -> Guess | None:
        shares = self.shares.get(peer)
        return None if shares is None else Guess(0, TOKEN, shares)

    def game(self, number: int) -> Game:
        self._ask("game")
        return self.states[number]

    def payout(self, number: int, peer: str) -> tuple[int, bool]:
        self._ask(f"payout of {peer}")
        return self.payouts.get(peer, 0), False

    def balance(self, peer: str) -> int:
        self._ask(f"balance of {peer}")
        return self.balances.get(peer, 0)
