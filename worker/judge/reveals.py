"""Keep recently revealed answers, and reveal them again if the chain has lost the reveal.

A chain that is restored from its last dump has lost its last seconds. A game whose reveal is lost
would wait until it expires, and its winners would only get back their bets.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from worker.chain.market import GameStatus, Market
from worker.chain.settlement import LAST_RECHECK_SECONDS, RECHECK_SECONDS
from worker.chain.transaction_queue import Sender
from worker.errors import ContractRefused
from worker.judge.past_games import foreign
from worker.runtime.files import write_whole

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reveal:
    """An answer with the salt of its commitment, of a game that was settled at `at` (Unix time)."""

    game: int
    answer: int
    salt: int
    at: float


_REVEALS = TypeAdapter(list[Reveal])


class Reveals:
    """The reveals of the last minutes, in `file`. Raises WorkerError for a damaged file."""

    def __init__(self, file: Path, market: Market, sender: Sender) -> None:
        self._file = file
        self._market = market
        self._sender = sender
        self._check_at = 0.0
        try:
            self._reveals = _REVEALS.validate_json(file.read_bytes())
        except FileNotFoundError:
            self._reveals = []
        except ValidationError as error:
            raise foreign(file, error.errors()[0]["msg"]) from None

    def send(self, game: int, answer: int, salt: int) -> None:
        """Reveal the answer of a game whose last round is over."""
        self._sender.send(self._market.call("revealAnswer", game, answer, salt))

    def keep(self, game: int, answer: int, salt: int) -> None:
        """Store the reveal of a game that is settled on the chain."""
        others = [reveal for reveal in self._reveals if reveal.game != game]
        self._save([*others, Reveal(game, answer, salt, time.time())])

    def check(self) -> None:
        """If the next check is due, reveal again the answers whose reveals the chain has lost."""
        now = time.time()
        if now < self._check_at:
            return
        kept = [reveal for reveal in self._reveals if self._is_kept(reveal, now)]
        if kept != self._reveals:
            self._save(kept)
        self._check_at = now + RECHECK_SECONDS

    def _is_kept(self, reveal: Reveal, now: float) -> bool:
        """Reveal the answer again, if that is due; return whether to check the game once more."""
        try:
            status = self._market.game(reveal.game).status
            if status == GameStatus.SETTLED:
                return now - reveal.at < LAST_RECHECK_SECONDS
            if status == GameStatus.CLOSED:
                log.warning("chain forgot a reveal, sending it again game=%d", reveal.game)
                self.send(reveal.game, reveal.answer, reveal.salt)
                return True
            reason = status.name.lower()
        except ContractRefused as refusal:
            reason = refusal.name or str(refusal)
        # The answer is public by now, so later bets in this game must not count.
        log.warning("chain forgot a game game=%d: %s; it is not settled", reveal.game, reason)
        return False

    def _save(self, reveals: list[Reveal]) -> None:
        write_whole(self._file, json.dumps([asdict(each) for each in reveals]), mode=0o600)
        self._reveals = reveals
