"""Run games on the chain, one after the other, through any number of crashes.

The queue of transactions (chain.transaction_queue) sends each call to the chain. Everything else is
read from the contract: the game's round, and whether it is settled. So a judge continues after it
was killed, and after its chain has lost its last seconds. If the chain has forgotten a game, that
game is given up, and another one is opened.
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

from worker.chain.market import Game, GameStatus, Market, commitment
from worker.chain.transaction_queue import Sender
from worker.errors import ContractRefused
from worker.judge import past_games
from worker.judge.past_games import PastGames, foreign
from worker.judge.problems import Problem
from worker.judge.reveals import Reveals
from worker.runtime.files import write_whole
from worker.settings import Judge

log = logging.getLogger(__name__)

NO_CLUE: dict[str, Any] = {
    "game_id": -1,
    "clue_id": -1,
    "rounds_remaining": -1,
    "clue": "",
    "choices": [],
}
"""The reply while no game accepts bets, in the format of RL Swarm's judge."""
LOOKS = 3
"""Steps in which a game that may have been opened is looked for, before it is opened again.

The account's nonce says that the call was mined; the log may show that block a little later, above
all if several machines answer for an RPC address.
"""


@dataclass(frozen=True, slots=True)
class State:
    """A game in progress, as it is on disk.

    `salt` hides the answer until it is revealed. `game` None: not known to be on the chain. `round`
    began at `began_at` (Unix seconds); None: no round was seen yet. The game is opened in a block
    after `block`; 0: in any block, as in files of earlier versions. `is_told`: the answer was sent
    to the chain, so others may know it.
    """

    problem: Problem
    salt: int
    game: int | None = None
    round: int | None = None
    began_at: float = 0.0
    block: int = 0
    is_told: bool = False


_STATE = TypeAdapter(State)


class Conductor:
    """The games of one judge, whose game in progress is in game.json in `judge.state_dir`."""

    def __init__(
        self, judge: Judge, market: Market, account: LocalAccount, problems: Iterator[Problem]
    ) -> None:
        self._settings = judge
        self._market = market
        self._problems = problems
        folder = judge.state_dir
        self._file = folder / "game.json"
        self._state = _read(self._file)
        self._past = PastGames(folder / past_games.FILE)
        self._sender = Sender(market.client, account, folder / "transactions.db")
        self._reveals = Reveals(folder / "reveals.json", market, self._sender)
        self._next_at = 0.0
        self._looks_left = LOOKS  # a process before this one may have sent the call
        self.num_games = 0
        """Number of games that ended since this process started."""
        self._clue = NO_CLUE

    def clue(self) -> dict[str, Any]:
        """Return the clue on which bets are accepted now; NO_CLUE if betting is closed."""
        return self._clue

    def past_games(self, count: int) -> list[dict[str, Any]]:
        """Return the last `count` games that ended, newest first."""
        return self._past.newest(count)

    def step(self) -> None:
        """Do the next thing that is due, if any.

        Raises ChainUnreachable and ChainError; the next step tries again.
        """
        if self._sender.tend():
            return  # the next step depends on its result
        self._reveals.check()
        if self._state is None:
            self._plan()
        elif self._state.game is None:
            self._open(self._state)
        else:
            self._conduct(self._state, self._state.game)

    # ---- what may be due

    def _plan(self) -> None:
        limit = self._settings.max_games
        if time.time() < self._next_at or (limit is not None and self.num_games >= limit):
            return
        block = self._market.client.block_number()
        problem = next(self._problems, None)
        if problem is not None:
            self._looks_left = 0
            # On disk before the commitment is sent: the answer can't be revealed without the salt.
            self._save(State(problem, secrets.randbits(256), block=block))

    def _open(self, state: State) -> None:
        newest = self._market.client.block_number()
        if newest < state.block:  # the chain was restored to an older block
            state = replace(state, block=newest)
            self._save(state)
        problem = state.problem
        hidden = commitment(problem.answer, state.salt)
        call = self._market.call("createNewGame", len(problem.clues), len(problem.choices), hidden)
        number = self._market.opened_by(call, state.block)
        if number is None and self._looks_left:
            self._looks_left -= 1
            return
        if number is None:
            self._looks_left = LOOKS
            self._sender.send(call)
            return
        log.info("game opened game=%s", number)
        state = replace(state, game=number)
        self._save(state)
        self._conduct(state, number)

    def _conduct(self, state: State, number: int) -> None:
        try:
            game = self._market.game(number)
        except ContractRefused as refusal:
            if refusal.name != "UnknownGame":
                raise
            self._end(state, "lost")  # the chain was restored to before the game
            return
        if game.status == GameStatus.OPEN and state.is_told:
            # The chain was restored to before the game's last round, and the answer may be known:
            # the game expires, and all bets are returned.
            self._end(state, "lost")
        elif game.status == GameStatus.OPEN:
            self._conduct_round(state, game)
        elif game.status == GameStatus.CLOSED:
            self._clue = NO_CLUE
            if not state.is_told:
                state = replace(state, is_told=True)
                self._save(state)
            self._reveals.send(number, state.problem.answer, state.salt)
        else:
            if game.status == GameStatus.SETTLED:
                self._reveals.keep(number, state.problem.answer, state.salt)
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
        if state.problem.family is not None:  # not in the format of RL Swarm's judge
            clue["family"] = state.problem.family
        self._clue = clue
        if time.time() - state.began_at >= self._settings.round_seconds:
            self._sender.send(self._market.call("incrementRound", state.game))

    def _end(self, state: State, result: str) -> None:
        """Record how a game ended, and drop its state; safe to repeat after a crash in between."""
        self._clue = NO_CLUE
        problem = state.problem.model_dump(mode="json")
        self._past.add({"game": state.game, "result": result, "ended_at": time.time(), **problem})
        log.info("game ended game=%s result=%s", state.game, result)
        self._file.unlink(missing_ok=True)
        self._state = None
        self.num_games += 1
        self._next_at = time.time() + self._settings.pause_seconds

    def _save(self, state: State) -> None:
        kept = asdict(state) | {"problem": state.problem.model_dump(mode="json")}
        write_whole(self._file, json.dumps(kept), mode=0o600)
        self._state = state


def _read(file: Path) -> State | None:
    """Return the game in progress, from a file that is written atomically.

    Raises WorkerError for a file that a judge can't have written.
    """
    try:
        return _STATE.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise foreign(file, error.errors()[0]["msg"]) from None
