"""Run games on the chain, one after the other, through any number of crashes.

Before a transaction is sent, it is signed and written to disk. A judge that was killed sends the
same transaction again, which the chain accepts once, and reads everything else from the contract:
the game's round, whether it is settled. A chain that lost its last seconds gets the transaction
again; a game that it has forgotten is given up, and another one opened.
"""

import json
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eth_account.signers.local import LocalAccount
from pydantic import TypeAdapter, ValidationError

from worker.chain.client import Call, NonceUsed, TransactionRefused
from worker.chain.market import Game, GameStatus, Market, commitment
from worker.errors import ContractRefused, WorkerError
from worker.judge.problems import Problem
from worker.runtime.files import write_whole
from worker.settings import Judge

log = logging.getLogger(__name__)

_MINING_SECONDS = 30.0
NO_CLUE: dict[str, Any] = {
    "game_id": -1,
    "clue_id": -1,
    "rounds_remaining": -1,
    "clue": "",
    "choices": [],
}
"""The answer while no game takes bets, in the existing judge's form."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A signed transaction that may or may not have been sent; `raw` in hexadecimal."""

    call: str
    raw: str
    tx_hash: str


@dataclass(frozen=True, slots=True)
class State:
    """A game in progress, as it is on disk.

    `salt` hides the answer until it is revealed. `game` None: not on the chain yet. `round` began
    at `began_at` (Unix seconds); None: no round was seen yet.
    """

    problem: Problem
    salt: int
    game: int | None = None
    round: int | None = None
    began_at: float = 0.0
    pending: Pending | None = None


_STATE = TypeAdapter(State)


class Conductor:
    """The games of one judge. `state_dir` has game.json and the past games in games.jsonl."""

    def __init__(
        self, judge: Judge, market: Market, account: LocalAccount, problems: Iterator[Problem]
    ) -> None:
        self._settings = judge
        self._market = market
        self._account = account
        self._problems = problems
        self._file = judge.state_dir / "game.json"
        self._past_file = judge.state_dir / "games.jsonl"
        self._state = _read(self._file)
        self._next_at = 0.0
        self.num_games = 0
        """Games that ended since this process started."""
        self._clue = NO_CLUE

    def clue(self) -> dict[str, Any]:
        """Return the clue that bets are taken on now; NO_CLUE if there is none."""
        return self._clue

    def past_games(self) -> list[dict[str, Any]]:
        """Return the games that ended, oldest first."""
        if not self._past_file.exists():
            return []
        try:
            return [json.loads(line) for line in self._past_file.read_bytes().splitlines()]
        except ValueError as error:
            raise _foreign(self._past_file, error) from None

    def step(self) -> None:
        """Do the next thing that is due, if any.

        Raises ChainUnreachable and ChainError; the next step tries again.
        """
        if self._state is None:
            self._plan()
        elif self._state.pending is not None:
            self._settle(self._state, self._state.pending)
        elif self._state.game is None:
            self._open(self._state)
        else:
            self._conduct(self._state, self._state.game)

    # ---- what may be due

    def _plan(self) -> None:
        limit = self._settings.max_games
        if time.time() < self._next_at or (limit is not None and self.num_games >= limit):
            return
        # On disk before anybody sees its commitment: without the salt it could not be revealed.
        self._save(State(next(self._problems), secrets.randbits(256)))

    def _open(self, state: State) -> None:
        problem = state.problem
        hidden = commitment(problem.answer, state.salt)
        call = self._market.call("createNewGame", len(problem.clues), len(problem.choices), hidden)
        self._send(state, call)

    def _conduct(self, state: State, number: int) -> None:
        try:
            game = self._market.game(number)
        except ContractRefused as refusal:
            if refusal.name != "UnknownGame":
                raise
            self._end(state, "lost")  # the chain was restored from before it
            return
        if game.status == GameStatus.OPEN:
            self._conduct_round(state, game)
        elif game.status == GameStatus.CLOSED:
            self._clue = NO_CLUE
            call = self._market.call("revealAnswer", number, state.problem.answer, state.salt)
            self._send(state, call)
        else:
            self._end(state, game.status.name.lower())

    def _conduct_round(self, state: State, game: Game) -> None:
        if state.round != game.round:
            state = replace(state, round=game.round, began_at=time.time())
            self._save(state)
        clue = {
            "game_id": state.game,
            "clue_id": game.round,
            "rounds_remaining": game.num_rounds - game.round,
            "clue": state.problem.clues[game.round],
            "choices": list(state.problem.choices),
        }
        if state.problem.family is not None:  # beyond the existing judge's form
            clue["family"] = state.problem.family
        self._clue = clue
        if time.time() - state.began_at >= self._settings.round_seconds:
            self._send(state, self._market.call("incrementRound", state.game))

    def _end(self, state: State, result: str) -> None:
        """Record how a game ended, and forget it; once, also after a crash in between."""
        self._clue = NO_CLUE
        problem = state.problem.model_dump(mode="json")
        line = {"game": state.game, "result": result, "ended_at": time.time(), **problem}
        others = [game for game in self.past_games() if game["game"] != state.game]
        lines = "".join(json.dumps(game) + "\n" for game in [*others, line])
        write_whole(self._past_file, lines)
        log.info("game ended game=%s result=%s", state.game, result)
        self._file.unlink(missing_ok=True)
        self._state = None
        self.num_games += 1
        self._next_at = time.time() + self._settings.pause_seconds

    # ---- transactions

    def _send(self, state: State, call: Call) -> None:
        client = self._market.client
        gas = client.estimate_gas(self._account.address, call)
        nonce, price_wei = client.nonce(self._account.address), client.allowed_price()
        tx_hash, raw = client.sign(
            self._account, call, nonce=nonce, gas=gas, gas_price_wei=price_wei
        )
        pending = Pending(call.name, raw.hex(), tx_hash)
        state = replace(state, pending=pending)
        self._save(state)
        self._settle(state, pending)

    def _settle(self, state: State, pending: Pending) -> None:
        """Bring a signed transaction to the chain, if it is not there, and record its result."""
        client = self._market.client
        receipt = client.receipt(pending.tx_hash)
        if receipt is None:
            try:
                client.send_raw(bytes.fromhex(pending.raw))
            except (NonceUsed, TransactionRefused) as error:
                # Mined since we looked, or never to be mined: the next step finds out.
                if client.receipt(pending.tx_hash) is None:
                    log.warning("transaction given up call=%s error=%s", pending.call, error)
                    self._save(replace(state, pending=None))
                return
            receipt = client.wait_for_receipt(pending.tx_hash, _MINING_SECONDS)
        state = replace(state, pending=None)
        if receipt.succeeded and pending.call == "createNewGame":
            state = replace(state, game=self._market.opened_game(pending.tx_hash))
            log.info("game opened game=%s", state.game)
        self._save(state)

    def _save(self, state: State) -> None:
        kept = asdict(state) | {"problem": state.problem.model_dump(mode="json")}
        write_whole(self._file, json.dumps(kept), mode=0o600)
        self._state = state


def _read(file: Path) -> State | None:
    """Return the game in progress. The file is replaced as a whole, so it is never half written.

    Raises WorkerError for a file that a judge can't have written.
    """
    try:
        return _STATE.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise _foreign(file, error) from None


def _foreign(file: Path, error: ValueError) -> WorkerError:
    reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return WorkerError(f"{file}: not what a judge writes ({reason}); move it away")
