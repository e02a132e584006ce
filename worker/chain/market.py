"""Client of the prediction market contract, ours or a foreign one with the same ABI.

Reads and calls are as in coordinator.py, and use its connection. docs/prediction-market.md explains
the market's rules.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from eth_abi.abi import encode
from web3 import Web3
from web3.contract import Contract

from worker.chain.client import Call, Unanswered
from worker.chain.contract import is_version, market_abi
from worker.chain.coordinator import Coordinator, Event
from worker.chain.logs import Window, walk
from worker.chain.rpc import TooMuch
from worker.errors import ContractRefused

TOKEN = 10**18
"""Number of units in a bet token, and in a share."""
_WITHOUT_PAID_OPENING = "hivewright/1"
_CREATION_BLOCKS = 100_000
"""Number of blocks in which the creation of a game is searched."""


class GameStatus(IntEnum):
    """The state of a game in our contract."""

    UNKNOWN = 0
    OPEN = 1
    CLOSED = 2
    SETTLED = 3
    CANCELLED = 4


@dataclass(frozen=True, slots=True)
class Game:
    """A game in our contract. `round` equals `num_rounds` when bets are no longer accepted.

    `right_choice` is valid only if the game is settled; `deadline` is the time (seconds since 1970)
    after which the game can only be cancelled.
    """

    status: GameStatus
    round: int
    num_rounds: int
    right_choice: int
    deadline: int


@dataclass(frozen=True, slots=True)
class Guess:
    """A bet of a peer in a round; `bet` in units of a token, `shares` in units of a share."""

    choice: int
    bet: int
    shares: int


class Market:
    """The market at `address`, on the chain of `client`.

    Every method may raise ChainUnreachable, ContractRefused and ChainError.
    """

    def __init__(self, client: Coordinator, address: str) -> None:
        self.client = client
        self.address = Web3.to_checksum_address(address)
        self._window = Window()

    @functools.cached_property
    def version(self) -> str | None:
        """Our contract's version ("hivewright/1"); None for a foreign one.

        It is read twice before the contract counts as foreign, because a node whose state is
        incomplete may fail to answer once.
        """
        try:
            version = self.read("version")
        except (ContractRefused, Unanswered):
            if not self.client.has_code(self.address):
                raise
            version = self._second_opinion()
        return version if isinstance(version, str) and is_version(version) else None

    def _second_opinion(self) -> Any:
        try:
            return self.read("version")
        except (ContractRefused, Unanswered):
            return None

    @functools.cached_property
    def _contract(self) -> Contract:
        return self.client.web3.eth.contract(address=self.address, abi=market_abi())

    # ---- reads of every market

    def read(
        self,
        name: str,
        *arguments: Any,
    ) -> Any:
        """Call any view by its name, such as `gameStatus`."""
        with self.client.translated(name):
            return self._contract.functions[name](*arguments).call()

    def balance(self, peer_id: str) -> int:
        """Return the peer's bet tokens, in units."""
        return int(self.read("betTokenBalance", peer_id))

    def current_round(self, game: int) -> int:
        return int(self.read("currentRoundIdx", game))

    def shares_of(
        self,
        game: int,
        choice: int,
        peer_id: str,
    ) -> int:
        return int(self.read("choiceTokenBalance", game, choice, peer_id))

    def supply(self, game: int, choice: int) -> int:
        """Return the shares of a choice that peers own."""
        return int(self.read("choiceSupply", game, choice))

    def total_bets(self, game: int) -> int:
        return int(self.read("totalBets", game))

    def shares_for(
        self,
        game: int,
        round: int,
        choice: int,
        bet: int,
    ) -> int:
        """Return the shares that a bet buys now, in the current round."""
        return int(self.read("choiceTokensOut", game, round, choice, bet))

    def paid_opening(self) -> int:
        """Return the opening shares of each choice, if they are paid to all bettors; otherwise 0.

        Our contract pays them since version 2. A foreign one is assumed to pay only shareholders.
        """
        # Read each time, because the contract may have been upgraded meanwhile.
        if self.version is None or self.read("version") == _WITHOUT_PAID_OPENING:
            return 0
        return int(self.read("OPENING"))

    def right_choice(
        self,
        game: int,
        from_block: int,
    ) -> int | None:
        """Return the revealed answer; None while it is not revealed.

        In a foreign market only the log has it, which is read from `from_block`.
        """
        if self.version is not None:
            found = self.game(game)
            return found.right_choice if found.status == GameStatus.SETTLED else None
        for event in self.events("AnswerRevealed", {"gameIdx": game}, from_block):
            return int(event.arguments["correctChoiceIdx"])
        return None

    def creation(self, game: int) -> str | None:
        """Return the hash of the transaction that opened the game.

        A chain that was restored to before it may give its number to another game. None: the node
        does not have the log of it.
        """
        newest = self.client.block_number()
        first = max(0, newest - _CREATION_BLOCKS)
        opened = self.events("NewGameCreated", {"gameIdx": game}, first, newest, newest_first=True)
        try:
            event = next(opened, None)
        except TooMuch:
            return None
        return None if event is None else event.tx_hash

    def guess_of(
        self,
        game: int,
        peer_id: str,
        round: int,
        from_block: int,
    ) -> Guess | None:
        """Return the peer's bet in a round; None: it made none.

        In a foreign market only the log has it, without shares; it is read from `from_block`.
        """
        if self.version is not None:
            made, choice, bet, shares = self.read("getGuess", game, peer_id, round)
            return Guess(choice, bet, shares) if made else None
        for event in self.events("NewGuess", {"gameIdx": game}, from_block):
            said = event.arguments
            if (said["peerId"], said["roundIdx"]) == (peer_id, round):
                return Guess(said["choiceIdx"], said["bet"], 0)
        return None

    def events(
        self,
        name: str,
        filters: dict[str, Any],
        from_block: int,
        to_block: int | None = None,
        *,
        newest_first: bool = False,
    ) -> Iterator[Event]:
        """Yield the log entries of one name, with `filters` by indexed arguments.

        `to_block` None: up to the latest block.
        """
        yield from walk(
            functools.partial(self.client.fetch_log, self._contract, name, filters),
            from_block,
            self.client.block_number() if to_block is None else to_block,
            newest_first,
            self._window,
        )

    # ---- reads of our market

    def num_games(self) -> int:
        return int(self.read("gameCount"))

    def game(self, game: int) -> Game:
        status, *numbers = self.read("getGame", game)
        return Game(GameStatus(status), *numbers)

    def opened_by(self, call: Call, from_block: int) -> int | None:
        """Return the number of the game that a transaction with this call opened; None: none has.

        The log is read back to `from_block`.
        """
        for event in self.events("NewGameCreated", {}, from_block, newest_first=True):
            if self.client.input_of(event.tx_hash) == call.data:
                return int(event.arguments["gameIdx"])
        return None

    def payout(
        self,
        game: int,
        peer_id: str,
    ) -> tuple[int, bool]:
        """Return what a claim pays or has paid, in units of a token, and whether it was claimed."""
        payout, is_claimed = self.read("getPayout", game, peer_id)
        return int(payout), bool(is_claimed)

    # ---- writes: built here, sent by the owner of the key

    def call(
        self,
        name: str,
        *arguments: Any,
    ) -> Call:
        """Return any write by its name, such as `claimReward`."""
        data = self._contract.encode_abi(name, list(arguments))
        return Call(name, bytes.fromhex(data[2:]), self.address)

    def guess_answer(
        self,
        game: int,
        peer_id: str,
        round: int,
        choice: int,
        bet: int,
    ) -> Call:
        return self.call("guessAnswer", game, peer_id, round, choice, bet)

    def claim_reward(self, game: int, peer_id: str) -> Call:
        return self.call("claimReward", game, peer_id)


def commitment(choice: int, job_id: int) -> bytes:
    """Return the commitment to an answer, with a random number of 256 bits that hides it."""
    return bytes(Web3.keccak(encode(["uint256", "uint256"], [choice, job_id])))
