"""Send bets, follow them on the chain, claim winnings, and rate the model's beliefs.

A bet is in the journal before it is sent, and the contract shows whether it counts. Our contract
accepts one bet for each clue, so the bet is sent until it is there; to a foreign contract it is
sent once. If one bet can't be read, the others are not delayed.
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
"""Time between two checks of recently ended rows: a restored chain may have lost their end."""
_RECENT_SECONDS = 600.0
_RECHECK_ROWS = 16
_DAY = 86_400.0
_FORGET_SECONDS = 600.0
"""Time after which a bet is given up if the chain does not know its game."""
_LONGEST_SECONDS = 7 * _DAY
"""Time after which a bet is given up if its game does not end: a judge may never reveal."""
_LOOKS_PER_AGE = 0.1
"""Time between two checks of a row that is not urgent, as a share of its age."""
REPLACED = "the chain was restored from before the game"
_NOT_ENDED = "the game did not end within 7 days"


@dataclass(frozen=True, slots=True)
class _Result:
    """How a game ended for us.

    `right` None: it was cancelled. `payout` in units of a token; None: it pays an unknown amount,
    because a foreign market does not tell it in advance.
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
        # Before the attempt: on a foreign market a bet with an unknown result must not be repeated.
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
        """Note that there was an outage, after which the chain may have lost its last blocks."""
        self._is_in_doubt, self._recheck_at = True, 0.0

    def follow(self) -> None:
        """Update all open rows from the contract. Raises ChainUnreachable."""
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
            # The chain was restored to before the bet: treat it as sent without an answer.
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
        """Return whether to send a claim: one for all bets of the game, until it counts."""
        if row.state == "claiming":
            return _is_old(row)
        return not self._journal.has_other(row, "claiming")

    def _note_payment(self, row: Row, result: _Result) -> None:
        """Close a row that is paid; the line of a game's first row reports the payment of all."""
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
        """Give up a bet if the chain has lost its game for long; otherwise try again later.

        It waits because the judge may open the game again.
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
        """End a row in this state; `what`: text of the record's line about it, None: no line."""
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
        # A foreign market does not tell what it pays, or whether it has paid. It pays only once,
        # so a claim whose answer was lost may be repeated.
        for event in market.events("RewardClaimed", {"gameIdx": row.game}, row.block):
            if event.arguments["peerId"] == self._peer_id:
                return _Result(right, event.arguments["betTokensOut"], is_claimed=True)
        # Read after the events, because a market may take the shares when it pays.
        has_shares = right is not None and market.shares_of(row.game, right, self._peer_id) > 0
        return _Result(right, None if has_shares else 0, is_claimed=False)

    def _is_cancelled(self, row: Row) -> bool:
        if self._market.version is None:
            return False
        return self._market.game(row.game).status == GameStatus.CANCELLED

    # ---- rows that ended

    def _recheck(self) -> None:
        """Open rows again whose payment or loss the chain has forgotten.

        It checks rows that ended recently; after a start and after an outage, those of the last
        day. (A foreign chain replaces only its last few blocks.)
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
        """Open the row again if its end is no longer in the contract; return whether it was."""
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
        """Return whether to check a row now, and note the check.

        It is checked each time until it is `young_seconds` old, then less and less often.
        """
        now = time.monotonic()
        if now < self._look_at.get(row.key, 0.0):
            return False
        age = time.time() - row.asked_at - young_seconds
        self._look_at[row.key] = now + max(0.0, _LOOKS_PER_AGE * age)
        return True


def line_of(row: Row, what: str) -> str:
    """Return a line of the record, in RL Swarm's format: time, game, round, and the action."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    return printable(f"[{stamp}] Game {row.game} Round {row.round}: {what}")


def is_replaced(market: Market, row: Row) -> bool:
    """Return whether the chain has lost the row's game and reused its number for another."""
    creation = market.creation(row.game) if row.creation else None
    return creation not in (None, row.creation)


def _is_old(row: Row) -> bool:
    """Return whether a transaction that was sent for the row should have arrived by now."""
    return time.time() - row.changed_at > RESEND_SECONDS


def _is_outage(error: ChainError) -> bool:
    """Return whether no row can be read now, not only this one."""
    return isinstance(error, ChainUnreachable) and not isinstance(error, BadAnswer)
