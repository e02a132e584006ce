"""A prediction market in memory, ours or a foreign one, and the account that bets in it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from worker.chain.coordinator import Event
from worker.chain.market import Game, GameStatus, Guess
from worker.errors import ChainUnreachable, ContractRefused

ADDRESS = "0x" + "A" * 40
PEER = "anna"


@dataclass
class SmallGame:
    """A game: `bets` of the peer by round; `right` is told once it is settled."""

    creation: str
    status: GameStatus = GameStatus.OPEN
    round: int = 0
    right: int = 0
    bets: dict[int, Guess] = field(default_factory=dict)
    is_claimed: bool = False

    @property
    def payout(self) -> int:
        """Return the tokens bet on the right choice; after a cancelled game, on all choices."""
        is_refund = self.status == GameStatus.CANCELLED
        return sum(
            guess.bet for guess in self.bets.values() if is_refund or guess.choice == self.right
        )


class SmallMarket:
    """Contract and account in one. `fails`: what a read of a game raises in place of an answer.

    `is_deaf`: a transaction arrives, and its answer does not. `is_slow`: a claim is mined later.
    """

    def __init__(self, version: str | None = "hivewright/1") -> None:
        self.version, self.address = version, ADDRESS
        self.games: dict[int, SmallGame] = {}
        self.fails: dict[int, Exception] = {}
        self.is_deaf, self.is_slow = False, False
        self.num_bets, self.num_claims, self.num_reads = 0, 0, 0

    def open(self, game: int = 0, creation: str = "0xa") -> SmallGame:
        self.games[game] = SmallGame(creation)
        return self.games[game]

    def settle(self, game: int = 0, right: int = 0) -> None:
        found = self.games[game]
        found.round, found.status, found.right = 9, GameStatus.SETTLED, right

    def _game(self, number: int) -> SmallGame:
        self.num_reads += 1
        if number in self.fails:
            raise self.fails[number]
        if number not in self.games:
            raise ContractRefused("UnknownGame", "no such game")
        return self.games[number]

    # ---- the contract

    def creation(self, game: int) -> str | None:
        return self.games[game].creation if game in self.games else None

    def game(self, game: int) -> Game:
        found = self._game(game)
        return Game(found.status, found.round, 9, found.right, 0)

    def current_round(self, game: int) -> int:
        return self._game(game).round

    def guess_of(self, game: int, peer_id: str, round: int, block: int) -> Guess | None:
        return self._game(game).bets.get(round)

    def right_choice(self, game: int, block: int) -> int | None:
        found = self._game(game)
        return found.right if found.status == GameStatus.SETTLED else None

    def payout(self, game: int, peer_id: str) -> tuple[int, bool]:
        found = self._game(game)
        return found.payout, found.is_claimed

    def shares_of(self, game: int, choice: int, peer_id: str) -> int:
        return sum(guess.bet for guess in self._game(game).bets.values() if guess.choice == choice)

    def events(self, name: str, filters: dict[str, Any], first: int) -> Iterator[Event]:
        assert name == "RewardClaimed"
        found = self._game(filters["gameIdx"])
        if found.is_claimed:
            yield Event(name, {"peerId": PEER, "betTokensOut": found.payout}, 1, "0x")

    # ---- the account

    def guess_answer(self, market: object, game: int, peer: str, *bet: int) -> str:
        round, choice, amount = bet
        found = self._game(game)
        if round in found.bets:
            raise ContractRefused("AlreadyGuessed", "twice")
        found.bets[round] = Guess(choice, amount, amount)
        self.num_bets += 1
        return self._answer()

    def claim_reward(self, market: object, game: int, peer: str) -> str:
        found = self._game(game)
        if found.is_claimed:
            raise ContractRefused("AlreadyClaimed", "twice")
        self.num_claims += 1
        found.is_claimed = not self.is_slow
        return self._answer()

    def _answer(self) -> str:
        if self.is_deaf:
            raise ChainUnreachable("the answer is lost")
        return "0x"
