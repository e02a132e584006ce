"""Submit the ledger's rows to the chain, each (round, stage, peer) exactly once.

One thread per node walks through the ledger in order. It sends through the account service, but
trusts only the contract: after a hash, a lost answer or "already submitted" it reads the contract's
state. So crashes, lost packets and a chain that has lost its last seconds do no harm. Without a
chain, rows wait.
"""

import logging
import random
import threading
import time
from dataclasses import dataclass

from worker import settings
from worker.chain.account_client import Account, require_owner
from worker.chain.client import Unanswered
from worker.chain.coordinator import Coordinator, LogGone
from worker.chain.ledger import Kind, Ledger, Row
from worker.errors import ChainError, ContractRefused, WorkerError

log = logging.getLogger(__name__)

KINDS: tuple[Kind, ...] = ("reward", "vote")
RESEND_SECONDS = 30.0
"""Seconds after which a sent row that is not on the chain is sent again."""
RECHECK_SECONDS = 30.0
"""Seconds after which a confirmed row is verified again, as at every start and after failures.

A chain that is restored from its last dump has lost later blocks.
"""
LAST_RECHECK_SECONDS = 300.0
"""Seconds after which a row is verified last: a public chain may replace its last few blocks."""
_RECHECK_ROWS = 16
_MAX_BACKOFF_SECONDS = 60.0
_FLUSH_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class SettlementStatus:
    """Number of this node's rewards: `earned` counts all, the others count them by state.

    `held_back`: earned, but not due yet by the settings. `last_error`: why the last attempt ended
    early; None if it did not.
    """

    earned: int
    sent: int
    confirmed: int
    rejected: int
    held_back: int
    last_error: str | None


class _NotYet(Exception):
    """The chain has not reached the row's round, or not mined the registration: rows wait."""


class Settlement:
    """Settles `ledger` in a thread, from `start` to `close`. `status` reports failures."""

    def __init__(
        self, ledger: Ledger, coordinator: Coordinator, account: Account, chain: settings.Chain
    ) -> None:
        self._ledger = ledger
        self._coordinator = coordinator
        self._account = account
        self._chain = chain
        self._changed = threading.Condition()
        self._is_awake = False
        self._is_flushing = False
        self._is_closing = False
        self._num_failures = 0
        self._num_moved = 0
        self._last_error: str | None = None
        self._postponed: ChainError | None = None
        self._recheck_at: float | None = 0.0
        self._is_last_recheck_due = False
        self._thread = threading.Thread(target=self._run, name="settlement", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Wake the thread, after something was recorded."""
        with self._changed:
            self._is_awake = True
            self._changed.notify_all()

    def flush(self, deadline_seconds: float) -> bool:
        """Try to settle all rows now, ignoring `submit_every_...`; return whether all are."""
        deadline = time.monotonic() + deadline_seconds
        with self._changed:
            self._is_flushing = True
            self._is_awake = True
            self._changed.notify_all()
            while self._ledger.unsettled() and self._thread.is_alive():
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, 1.0))
            self._is_flushing = False
        return not self._ledger.unsettled()

    def status(self) -> SettlementStatus:
        """Return the states of the rewards.

        Raises WorkerError if the thread died of an unexpected error.
        """
        has_died = self._thread.ident is not None and not self._thread.is_alive()
        if has_died and not self._is_closing:
            raise WorkerError(
                "settlement ended by itself; its traceback is in the log; start the node again"
            )
        counts = self._ledger.counts()
        return SettlementStatus(
            earned=sum(counts.values()),
            sent=counts["sent"],
            confirmed=counts["confirmed"],
            rejected=counts["rejected"],
            held_back=0 if self._is_due() else counts["earned"],
            last_error=self._last_error,
        )

    def close(self) -> None:
        """End the thread; wait for a request in progress, up to its time limit."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(2 * self._chain.timeout_seconds + 1)

    # ---- the thread

    def _run(self) -> None:
        while not self._is_closing:
            try:
                self._settle()
            except WorkerError as error:
                self._fail(error)
            else:
                self._recover()
            self._pause()

    def _settle(self) -> None:
        """Walk once through all unsettled rows, and verify recently confirmed ones."""
        self._num_moved = 0
        self._postponed = None
        self._account.tend()
        if self._is_flushing or self._is_due():
            self._ledger.queue()
        try:
            for row in self._ledger.unsettled():
                for kind in KINDS:
                    if self._is_closing:
                        return
                    self._settle_one(row, kind)
        except _NotYet:
            log.debug("waiting for the chain")
        if self._recheck_at is not None and time.monotonic() >= self._recheck_at:
            self._recheck()
        if self._postponed is not None:
            raise self._postponed

    def _settle_one(self, row: Row, kind: Kind) -> None:
        """Advance one reward or vote. An error of one row does not delay the others."""
        try:
            if row.state(kind) == "queued":
                self._submit(row, kind)
            elif row.state(kind) == "sent":
                self._look(row, kind)
        except (ContractRefused, LogGone, Unanswered) as error:
            self._postponed = error

    def _is_due(self) -> bool:
        """Return whether the settings require that earned rewards are sent now."""
        count, oldest = self._ledger.waiting()
        rounds, minutes = self._chain.submit_every_rounds, self._chain.submit_every_minutes
        if rounds is not None and count >= rounds:
            return True
        if minutes is None or oldest is None:
            return False
        return time.time() - oldest >= 60 * minutes

    def _submit(self, row: Row, kind: Kind) -> None:
        try:
            if kind == "reward":
                tx_hash = self._account.submit_reward(
                    row.round, row.stage, row.reward, row.peer_id, row.digest
                )
            else:
                tx_hash = self._account.submit_winner(row.round, row.winners, row.peer_id)
        except ContractRefused as refusal:
            self._answer(row, kind, refusal)
        else:
            self._ledger.sent(row, kind, tx_hash)
            self._num_moved += 1

    def _answer(
        self,
        row: Row,
        kind: Kind,
        refusal: ContractRefused,
    ) -> None:
        """Act on a refusal: already recorded, too early, unregistered, or never acceptable.

        After a refusal without a name the row is retried later, without delaying the others.
        """
        if refusal.name in ("RewardAlreadySubmitted", "WinnerAlreadyVoted"):
            self._look(row, kind)
        elif refusal.name in ("InvalidRoundNumber", "InvalidStageNumber") and self._is_early(row):
            raise _NotYet
        elif refusal.name == "InvalidVoterPeerId":
            self._register(row.peer_id)
            raise _NotYet
        elif refusal.name:
            self._reject(row, kind, str(refusal))
        else:
            self._postponed = refusal

    def _look(self, row: Row, kind: Kind) -> None:
        """Settle the row by the contract's state; resend it if it should be recorded by now."""
        sent_at = row.sent_at(kind)
        if self._compare(row, kind):
            return
        if (
            row.state(kind) == "sent"
            and sent_at is not None
            and time.time() - sent_at > RESEND_SECONDS
        ):
            log.warning("not on the chain, to be sent again kind=%s round=%d", kind, row.round)
            self._ledger.requeue(row, kind)

    def _compare(self, row: Row, kind: Kind) -> bool:
        """Confirm or reject by the contract's state; return False if it has no record."""
        ours: object = list(row.winners) if kind == "vote" else row.reward
        theirs = self._held(row, kind)
        if theirs not in (None, ours):
            # A rejection is final, so ask twice: a proxy may have mixed up answers.
            theirs = self._held(row, kind)
        if theirs is None:
            return False
        if theirs != ours:
            reason = (
                f"the chain holds {theirs}, this ledger {ours}; the chain's stands; "
                "most likely another process uses this node's identity: stop one of them"
            )
            self._reject(row, kind, reason)
        elif row.state(kind) != "confirmed":
            self._ledger.confirm(row, kind, self._block_of(row, kind))
            self._num_moved += 1
            if self._recheck_at is None:
                self._recheck_at = time.monotonic() + RECHECK_SECONDS
            self._is_last_recheck_due = True
        return True

    def _held(self, row: Row, kind: Kind) -> object:
        """Return the contract's record for the row; None if there is none."""
        if kind == "reward":
            return self._coordinator.submitted_reward(
                row.round, row.stage, row.peer_id, row.reward_hash
            )
        return self._coordinator.votes(row.round, row.peer_id) or None

    def _block_of(self, row: Row, kind: Kind) -> int:
        """Return the block of our transaction, or the newest if another transaction did it."""
        tx_hash = row.reward_hash if kind == "reward" else row.vote_hash
        receipt = self._coordinator.receipt(tx_hash) if tx_hash else None
        return receipt.block if receipt and receipt.succeeded else self._coordinator.block_number()

    def _is_early(self, row: Row) -> bool:
        """Return whether the row's round is still to come.

        The open round counts too: it may have begun after the refusal.
        """
        return (row.round, row.stage) >= (
            self._coordinator.current_round(),
            self._coordinator.current_stage(),
        )

    def _register(self, peer_id: str) -> None:
        """Register the peer if it has no owner, otherwise verify that its owner is our account.

        The contract refused us as the peer's account.
        """
        owner = self._coordinator.owner_of(peer_id)
        if owner is None:
            log.warning(
                "the chain does not know this peer, registering it again peer_id=%s", peer_id
            )
            self._account.register_peer(peer_id)
        else:
            require_owner(peer_id, owner, self._account.address())

    def _reject(
        self,
        row: Row,
        kind: Kind,
        reason: str,
    ) -> None:
        log.error(
            "rejected kind=%s round=%d stage=%d reason=%s", kind, row.round, row.stage, reason
        )
        self._ledger.reject(row, kind, reason)
        self._num_moved += 1

    def _recheck(self) -> None:
        """Verify the newest confirmed rows; if the chain has lost any of them, older ones too."""
        while any(self._has_lost(row) for row in self._ledger.confirmed(_RECHECK_ROWS)):
            pass
        self._recheck_at = (
            time.monotonic() + LAST_RECHECK_SECONDS if self._is_last_recheck_due else None
        )
        self._is_last_recheck_due = False

    def _has_lost(self, row: Row) -> bool:
        """Queue again what the chain no longer has of the row; return whether it lost any."""
        if self._is_closing:
            return False
        has_lost = False
        for kind in KINDS:
            if row.state(kind) != "confirmed" or self._compare(row, kind):
                continue
            has_lost = True
            log.warning("confirmed record lost, sending again kind=%s round=%d", kind, row.round)
            self._ledger.requeue(row, kind)
        return has_lost

    # ---- failures and waiting

    def _fail(self, error: WorkerError) -> None:
        if str(error) != self._last_error:
            log.warning("rewards wait in the ledger error=%s", error)
        self._last_error = str(error)
        # A walk with progress is not an outage: if every lost packet doubled the pause, a backlog
        # would never end.
        self._num_failures = 1 if self._num_moved else self._num_failures + 1
        self._recheck_at = 0.0

    def _recover(self) -> None:
        if self._last_error is not None:
            log.info("rewards are being sent again")
        self._last_error = None
        self._num_failures = 0

    def _pause(self) -> None:
        """Wait until something is recorded, or it is time to look again."""
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._is_awake or self._is_closing, self._pause_seconds()
            )
            self._is_awake = False

    def _pause_seconds(self) -> float:
        poll = self._chain.poll_seconds
        if self._is_flushing:
            return min(poll, _FLUSH_POLL_SECONDS)
        if self._num_failures:
            backoff = min(poll * 2.0 ** min(self._num_failures, 10), _MAX_BACKOFF_SECONDS)
            return max(poll, random.uniform(0.5, 1) * backoff)
        return poll
