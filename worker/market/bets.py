"""Send bets, follow them on the chain, claim what they win, and rate the model's beliefs.

A bet is in the journal before it is sent, and whether it counts is read from the contract: on our
contract, which takes one bet for each clue, it is sent until it is there; on a foreign one it is
sent once. What can't be read of one bet holds up no other.
"""

import logging
import time
from dataclasses import dataclass

from worker.chain.account_client import Account
from worker.chain.market import TOKEN, GameStatus, Market
from worker.errors import BadAnswer, ChainError, ChainUnreachable, ContractRefused
from worker.log import printable
from worker.market import policies
from worker.market.journal import Journal, Row
from worker.market.record import Record
from worker.records import BetState

log = logging.getLogger(__name__)

RESEND_SECONDS = 30.0
RECHECK_SECONDS = 30.0
"""Time between two looks at rows that ended lately: a restored chain may have forgotten why."""
_RECENT_SECONDS = 600.0
_RECHECK_ROWS = 16
_DAY = 86_400.0
_FORGET_SECONDS = 600.0
"""Time until a bet is given up whose game the chain does not know."""
_LONGEST_SECONDS = 7 * _DAY
"""Time until a bet is given up whose game does not end: a foreign judge may never reveal."""
_LOOKS_PER_AGE = 0.1
"""Time between two looks at what can wait, as a share of its age."""
REPLACED = "the chain was restored from before the game"
_NOT_ENDED = "the game did not end within 7 days"


@dataclass(frozen=True, slots=True)
class _Result:
    """How a game ended for us.

    `right` None: it was cancelled. `payout` in units of a token; None: it is paid something, and a
    foreign market does not say how much before.
    """

    right: int | None
    payout: int | None
    is_claimed: bool

    @property
    def state(self) -> BetState:
        """The state of the game's bets."""
        if self.is_claimed:
            return "paid"
        return "lost" if self.payout == 0 else "claiming"


class Bets:
    """The bets of `peer_id` in `market`, which `account` sends."""

    def __init__(
        self, market: Market, account: Account, peer_id: str, journal: Journal, record: Record
    ) -> None:
        self._market = market
        self._account = account
        self._peer_id = peer_id
        self._journal = journal
        self._record = record
        self._is_in_doubt = True
        self._recheck_at = 0.0
        self._look_at: dict[tuple[str, int, int, str], float] = {}

    def send(self, row: Row) -> None:
        """Send a bet of the journal. If the answer is lost, `follow` reads the contract."""
        # Before the attempt: on a foreign market none may follow one whose result is not known.
        self._journal.move(row, "sent")
        try:
            self._account.guess_answer(
                self._market, row.game, self._peer_id, row.round, row.choice, row.amount
            )
        except ContractRefused as refusal:
            if refusal.name != "AlreadyGuessed":
                why = f"the contract refused it ({refusal.name or 'no reason'})"
                self._end(row, "missed", refusal.name or str(refusal), f"no bet: {why}")

    def doubt(self) -> None:
        """Note that there was an outage: a chain that comes back may have forgotten its end."""
        self._is_in_doubt, self._recheck_at = True, 0.0

    def follow(self) -> None:
        """Move all rows on, as far as the contract has them. Raises ChainUnreachable."""
        self._record.write()
        rows = self._journal.open_rows(self._market.address)
        waiting = self._journal.unrated_rows(self._market.address, time.time() - _LONGEST_SECONDS)
        known = {row.key for row in (*rows, *waiting)}
        self._look_at = {key: at for key, at in self._look_at.items() if key in known}
        for row in rows:
            self._visit(row)
        for row in waiting:
            self._rate_later(row)
        if time.monotonic() >= self._recheck_at:
            self._recheck()

    # ---- open rows

    def _visit(self, row: Row) -> None:
        if self._market.version is None and not self._is_due(row, _FORGET_SECONDS):
            return
        try:
            if row.state in ("planned", "sent"):
                self._confirm(row)
            else:
                self._claim(row)
        except ChainError as error:
            if _is_outage(error):
                raise
            self._note(row, error)
        has_waited = time.time() - row.asked_at > _LONGEST_SECONDS and _is_old(row)
        if has_waited and self._journal.state_of(row) == row.state:
            if row.state in ("planned", "sent"):
                self._give_up(row, _NOT_ENDED)
            else:
                self._end(row, "lost", _NOT_ENDED, f"lost: {_NOT_ENDED}")

    def _confirm(self, row: Row) -> None:
        if is_replaced(self._market, row):
            self._give_up(row, REPLACED)
            return
        market = self._market
        if market.guess_of(row.game, self._peer_id, row.round, row.block) is not None:
            shown = repr(row.answer) if row.answer else f"choice {row.choice}"
            line = f"placed bet of {row.amount / TOKEN:.3f} on {shown}"
            self._end(row, "confirmed", None, line)
        elif market.current_round(row.game) != row.round or self._is_cancelled(row):
            self._give_up(row, "it was not on the chain when the round ended")
        elif row.state == "planned" or (market.version is not None and _is_old(row)):
            self.send(row)

    def _claim(self, row: Row) -> None:
        """Rate a bet whose answer is known, and claim what it is paid."""
        if self._market.version is not None and self._is_lost(row):
            # The chain was restored from before it: as if the answer to the bet were lost.
            self._journal.move(row, "sent")
            return
        result = self._result(row)
        if result is None:
            return
        if is_replaced(self._market, row):
            self._give_up(row, REPLACED)
            return
        self._rate(row, result.right)
        if result.state == "lost":
            self._end(row, "lost", None, "lost")
        elif result.state == "paid":
            self._note_payment(row, result)
        elif self._may_claim(row):
            self._journal.move(row, "claiming")
            self._send_claim(row)

    def _is_lost(self, row: Row) -> bool:
        """Return whether the chain does not have a confirmed bet any more."""
        found = self._market.guess_of(row.game, self._peer_id, row.round, row.block)
        return found is None

    def _may_claim(self, row: Row) -> bool:
        """Return whether a claim is to be sent: one for all bets of the game, until it is there."""
        if row.state == "claiming":
            return _is_old(row)
        return not self._journal.has_other(row, "claiming")

    def _note_payment(self, row: Row, result: _Result) -> None:
        """Close a row that is paid; the first one of its game tells of the payment of all."""
        line = None
        if not self._journal.has_other(row, "paid"):
            tokens = f"{(result.payout or 0) / TOKEN:.3f}"
            line = f"claimed {tokens} for the game"
            if result.right is None:
                line = f"got back {tokens}: the game was cancelled"
        self._end(row, "paid", None, line)

    def _send_claim(self, row: Row) -> None:
        try:
            self._account.claim_reward(self._market, row.game, self._peer_id)
        except ContractRefused as refusal:
            if refusal.name != "AlreadyClaimed":
                raise

    def _note(self, row: Row, error: ChainError) -> None:
        """Give up a bet of a game that the chain lost; try others again at the next look.

        The judge may bring the game back, so that takes a while.
        """
        is_unknown = isinstance(error, ContractRefused) and error.name == "UnknownGame"
        if is_unknown and time.time() - row.changed_at > _FORGET_SECONDS:
            self._give_up(row, REPLACED)
        elif row.reason != str(error):
            self._journal.note(row, str(error))
            log.warning("bet waits game=%d round=%d %s", row.game, row.round, error)

    def _give_up(self, row: Row, why: str) -> None:
        self._end(row, "missed", why, f"no bet: {why}")

    def _end(self, row: Row, state: BetState, reason: str | None, what: str | None) -> None:
        """Move a row, together with the record's line about it; None: it gets none."""
        self._journal.move(row, state, reason, None if what is None else line_of(row, what))
        self._record.write()

    # ---- what the contract says

    def _result(self, row: Row) -> _Result | None:
        """Return how the row's game ended; None: it has not."""
        market = self._market
        right = market.right_choice(row.game, row.block)
        if right is None and not self._is_cancelled(row):
            return None
        if market.version is not None:
            payout, is_claimed = market.payout(row.game, self._peer_id)
            return _Result(right, payout, is_claimed)
        # A foreign market does not say what it pays, or whether it has. It pays once in any case,
        # so a claim whose answer was lost may be repeated.
        for event in market.events("RewardClaimed", {"gameIdx": row.game}, row.block):
            if event.arguments["peerId"] == self._peer_id:
                return _Result(right, event.arguments["betTokensOut"], is_claimed=True)
        # After the events: a market may take the shares when it pays.
        has_shares = right is not None and market.shares_of(row.game, right, self._peer_id) > 0
        return _Result(right, None if has_shares else 0, is_claimed=False)

    def _is_cancelled(self, row: Row) -> bool:
        if self._market.version is None:
            return False
        return self._market.game(row.game).status == GameStatus.CANCELLED

    # ---- rows that ended

    def _recheck(self) -> None:
        """Open rows again that are not paid or lost any more: the chain forgot it.

        Those that ended lately; after a start and after an outage, those of the last day.
        A foreign chain only replaces its last few blocks.
        """
        is_restored = self._is_in_doubt and self._market.version is not None
        since = time.time() - (_DAY if is_restored else _RECENT_SECONDS)
        while any(self._reopen(row) for row in self._ended(since)):
            pass
        self._is_in_doubt = False
        self._recheck_at = time.monotonic() + RECHECK_SECONDS

    def _ended(self, since: float) -> list[Row]:
        return self._journal.ended_rows(self._market.address, since, _RECHECK_ROWS)

    def _reopen(self, row: Row) -> bool:
        """Open the row again if the contract does not say any more that it ended so."""
        try:
            result = self._result(row)
        except ChainError as error:
            if _is_outage(error):
                raise
            if not (isinstance(error, ContractRefused) and error.name == "UnknownGame"):
                log.debug("not checked game=%d round=%d %s", row.game, row.round, error)
                return False
            result = None
        if result is not None and result.state == row.state:
            return False
        log.warning("result of a bet lost by the chain game=%d round=%d", row.game, row.round)
        self._journal.move(row, "confirmed")
        return True

    def _rate_later(self, row: Row) -> None:
        """Rate beliefs on which no bet was made, once the answer is known."""
        if not self._is_due(row, 0.0):
            return
        try:
            right = self._market.right_choice(row.game, row.block)
            if right is not None and not is_replaced(self._market, row):
                self._rate(row, right)
        except ChainError as error:
            if _is_outage(error):
                raise
            log.debug("not rated game=%d round=%d %s", row.game, row.round, error)

    def _rate(self, row: Row, right: int | None) -> None:
        if right is not None and row.brier is None and row.beliefs:
            self._journal.rate(row, policies.brier(row.beliefs, right))

    def _is_due(self, row: Row, young_seconds: float) -> bool:
        """Return whether to look at a row now: the older it is, the less often.

        Each time, until it is `young_seconds` old. Notes the look.
        """
        now = time.monotonic()
        if now < self._look_at.get(row.key, 0.0):
            return False
        age = time.time() - row.asked_at - young_seconds
        self._look_at[row.key] = now + max(0.0, _LOOKS_PER_AGE * age)
        return True


def line_of(row: Row, what: str) -> str:
    """Return a line that the guide's users know: Game, Round, and what was done."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    return printable(f"[{stamp}] Game {row.game} Round {row.round}: {what}")


def is_replaced(market: Market, row: Row) -> bool:
    """Return whether the chain lost the row's game and gave its number to another one."""
    creation = market.creation(row.game) if row.creation else None
    return creation not in (None, row.creation)


def _is_old(row: Row) -> bool:
    """Return whether what was sent for the row should have arrived by now."""
    return time.time() - row.changed_at > RESEND_SECONDS


def _is_outage(error: ChainError) -> bool:
    """Return whether no row can be read now, not only this one."""
    return isinstance(error, ChainUnreachable) and not isinstance(error, BadAnswer)
