"""One queue of transactions per account, which assigns all nonces, so that senders never collide.

A transaction is written to the journal before it is sent, and removed when the chain has mined its
nonce. So the next nonce follows from the journal, or from the chain if the journal is empty, and
pending transactions are known after a restart. Whether a record is on the chain is not decided
here: chain.settlement reads that from the contract, which refuses a second transaction for the same
record.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from eth_account.signers.local import LocalAccount

from worker.chain.client import Call, NonceUsed, ReplacementUnderpriced, Underpriced
from worker.chain.coordinator import Coordinator
from worker.chain.database import Database
from worker.chain.queue_status import QueueState
from worker.errors import ChainError, ChainUnreachable, WorkerError

log = logging.getLogger(__name__)

STUCK_SECONDS = 20.0
"""A transaction that is not mined after this time is resent, at a higher price if allowed."""
_NONCE_ATTEMPTS = 32
"""Largest number of nonces used by other senders that one send skips."""
_PRICE_STEP = 1.125
"""Factor on the price of a replacement; nodes require 10 % more than the pending one's."""
_KEPT_HASHES = 5000
_PRICE_SECONDS = 1.0
"""Seconds for which a price is reused after it was read."""

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS waiting (
        nonce INTEGER PRIMARY KEY, name TEXT NOT NULL, address TEXT, data BLOB NOT NULL,
        gas INTEGER NOT NULL, price_wei INTEGER NOT NULL, hash TEXT NOT NULL, raw BLOB NOT NULL,
        sent_at REAL NOT NULL
    ) STRICT;
    CREATE TABLE IF NOT EXISTS arrivals (nonce INTEGER PRIMARY KEY, at REAL NOT NULL) STRICT;
    CREATE TRIGGER IF NOT EXISTS arrived AFTER INSERT ON waiting BEGIN
        INSERT OR REPLACE INTO arrivals
        VALUES (NEW.nonce, (julianday('now') - 2440587.5) * 86400.0);
    END;
    CREATE TRIGGER IF NOT EXISTS numbered_again AFTER UPDATE OF nonce ON waiting BEGIN
        UPDATE arrivals SET nonce = NEW.nonce WHERE nonce = OLD.nonce;
    END;
    CREATE TRIGGER IF NOT EXISTS forgotten AFTER DELETE ON waiting BEGIN
        DELETE FROM arrivals WHERE nonce = OLD.nonce;
    END;
    CREATE TABLE IF NOT EXISTS hashes (hash TEXT PRIMARY KEY, first TEXT NOT NULL) STRICT;
    CREATE INDEX IF NOT EXISTS hashes_of ON hashes (first);
    CREATE TRIGGER IF NOT EXISTS named AFTER INSERT ON waiting BEGIN
        INSERT OR IGNORE INTO hashes VALUES (NEW.hash, NEW.hash);
    END;
    CREATE TRIGGER IF NOT EXISTS named_again AFTER UPDATE OF hash ON waiting BEGIN
        INSERT OR IGNORE INTO hashes SELECT NEW.hash, first FROM hashes WHERE hash = OLD.hash;
    END;
"""
# These are separate tables with triggers, because earlier versions, to which a host may go back,
# read the columns of `waiting` by their position.


@dataclass(frozen=True, slots=True)
class Waiting:
    """A signed transaction that is not known to be mined.

    `sent_at`: Unix seconds, 0 while no node has accepted it.
    """

    nonce: int
    name: str
    address: str | None
    data: bytes
    gas: int
    price_wei: int
    hash: str
    raw: bytes
    sent_at: float

    @property
    def call(self) -> Call:
        return Call(self.name, self.data, self.address)


class Sender:
    """Send for `account`; `journal` is the file with pending transactions. Thread-safe.

    Call `tend` every few seconds. One Sender per account: a second one would assign the same
    nonces.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        account: LocalAccount,
        journal: Path,
    ) -> None:
        self._coordinator = coordinator
        self._account = account
        self._lock = threading.Lock()
        self._door = threading.Lock()
        self._arrived: dict[Call, Future[Waiting]] = {}
        """Calls that no thread is sending yet, with the futures that their callers wait for."""
        self._price_read = (float("-inf"), 0)
        self._journal = Database(journal, _SCHEMA, "NORMAL")
        # After a restart it is unknown which of them a node has accepted.
        self._journal.execute("UPDATE waiting SET sent_at = 0")
        self._journal.execute(
            "INSERT OR IGNORE INTO arrivals SELECT nonce, ? FROM waiting", (time.time(),)
        )
        self._journal.execute("INSERT OR IGNORE INTO hashes SELECT hash, hash FROM waiting")
        self._failed = 0
        self._last_error: tuple[str | None, float | None] = None, None

    def send(self, call: Call) -> str:
        """Try the call on the chain's present state, send it, and return the transaction's hash.

        A call that equals a pending one is not sent twice. Calls that arrive while others are being
        sent are sent together after them. Raises ContractRefused if the contract would refuse the
        call now, ChainUnreachable if no node accepted it; then it may still be sent later.
        """
        self._coordinator.ensure_checked()
        with self._door:
            outcome = self._arrived.setdefault(call, Future())
        with self._lock:
            if not outcome.done():
                self._send_arrived()
        return outcome.result().hash

    def tend(self) -> int:
        """Remove mined transactions, resend stuck ones, and return the number still pending.

        Raises ChainError or ChainUnreachable if that fails; nothing is lost.
        """
        with self._lock:
            try:
                return self._tend()
            except WorkerError as error:
                self._note_error("sending again", error)
                raise

    def _tend(self) -> int:
        if not self.waiting():
            return 0
        count = self._coordinator.nonce(self._account.address)
        self._journal.execute("DELETE FROM waiting WHERE nonce < ?", (count,))
        self._journal.execute(
            "DELETE FROM hashes WHERE rowid <= (SELECT max(rowid) FROM hashes) - ? AND hash NOT IN"
            " (SELECT hash FROM waiting)",
            (_KEPT_HASHES,),
        )
        waiting = self.waiting()
        if any(_is_stuck(entry) for entry in waiting):
            self._send_stuck(waiting, count)
        return len(waiting)

    def waiting(self) -> list[Waiting]:
        """Return the pending transactions in the order of their nonces."""
        return [
            Waiting(*row) for row in self._journal.execute("SELECT * FROM waiting ORDER BY nonce")
        ]

    def pending(self) -> dict[str, Waiting]:
        """Return the pending transactions by their first hashes."""
        firsts = dict(
            self._journal.execute("SELECT hash, first FROM waiting JOIN hashes USING (hash)")
        )
        return {firsts.get(entry.hash, entry.hash): entry for entry in self.waiting()}

    def hashes(self, tx_hash: str) -> list[str]:
        """Return all hashes of a transaction, in order; each new price or nonce adds one."""
        rows = self._journal.execute(
            "SELECT hash FROM hashes WHERE first = (SELECT first FROM hashes WHERE hash = ?) ORDER"
            " BY rowid",
            (tx_hash,),
        )
        return [each for (each,) in rows] or [tx_hash]

    def find(self, call: Call) -> Waiting | None:
        """Return the pending transaction of a call; None: the call is not pending."""
        found = self._journal.execute(
            "SELECT * FROM waiting WHERE data = ? AND address IS ?", (call.data, call.to)
        )
        return Waiting(*found[0]) if found else None

    def state(self) -> QueueState:
        """Return the counts of the queue."""
        ((num_waiting, num_sent),) = self._journal.execute(
            "SELECT count(*) FILTER (WHERE sent_at = 0), count(*) FILTER (WHERE sent_at > 0)"
            " FROM waiting"
        )
        ((oldest_at,),) = self._journal.execute("SELECT min(at) FROM arrivals")
        return QueueState(num_waiting, num_sent, oldest_at, self._failed, *self._last_error)

    def close(self) -> None:
        self._journal.close()

    def close_if_idle(self) -> bool:
        """Close the queue if nothing is pending; later calls then fail. Return whether it did."""
        with self._lock:
            if self.waiting():
                return False
            self._journal.close()
            return True

    def _note_error(self, what: str, error: WorkerError) -> None:
        self._last_error = f"{what}: {error}", time.time()

    def _price(self) -> int:
        """Return the chain's price, read at most once a second: concurrent calls share it."""
        read_at, price_wei = self._price_read
        if time.monotonic() - read_at > _PRICE_SECONDS:
            price_wei = self._coordinator.allowed_price()
            self._price_read = time.monotonic(), price_wei
        return price_wei

    def _send_arrived(self) -> None:
        """Send all calls that have arrived by now, on behalf of their callers."""
        with self._door:
            arrived, self._arrived = self._arrived, {}
        try:
            for call, outcome in self._send_all(list(arrived)):
                if isinstance(outcome, WorkerError):
                    self._note_error(call.name, outcome)
                    # If the chain gave no answer, the transaction still waits.
                    self._failed += not isinstance(outcome, ChainUnreachable)
                    arrived[call].set_exception(outcome)
                else:
                    arrived[call].set_result(outcome)
        finally:
            for call, future in arrived.items():
                if not future.done():
                    future.set_exception(
                        ChainError(f"{call.name}: not sent, as another call failed; send it again")
                    )

    def _send_all(
        self,
        calls: Sequence[Call],
    ) -> Iterator[tuple[Call, Waiting | WorkerError]]:
        """Yield the outcome of each call, with as few requests to the chain as possible."""
        entries: list[Waiting] = []
        new: list[Call] = []
        for call in calls:
            entry = self.find(call)
            if entry is None:
                new.append(call)
            else:
                entries.append(entry)
        estimates = self._coordinator.estimate_all(self._account.address, new)
        to_sign: list[tuple[Call, int]] = []
        for call, gas in zip(new, estimates, strict=True):
            if isinstance(gas, WorkerError):
                yield call, gas
            else:
                to_sign.append((call, gas))
        try:
            entries += self._sign_all(to_sign)
        except WorkerError as error:
            yield from ((call, error) for call, _ in to_sign)
        failure: ChainUnreachable | None = None
        for entry in self._deliver_all(entries):
            try:
                # It may have arrived, so it stays in the journal; the others do not wait as long
                # again.
                yield entry.call, failure or self._deliver_new(entry)
            except ChainUnreachable as error:
                failure = error
                yield entry.call, error
            except WorkerError as error:
                yield entry.call, error

    def _sign_all(
        self,
        calls: Sequence[tuple[Call, int]],
    ) -> list[Waiting]:
        """Sign the calls (with their gas) under the next nonces, and write them to the journal."""
        if not calls:
            return []
        price_wei, nonce = self._price(), self._next_nonce()
        entries = [
            self._signed(call, nonce + place, gas, price_wei)
            for place, (call, gas) in enumerate(calls)
        ]
        for entry in entries:
            self._write(entry)
        return entries

    def _next_nonce(self) -> int:
        ((last,),) = self._journal.execute("SELECT max(nonce) FROM waiting")
        if last is not None:
            return int(last) + 1
        return self._coordinator.nonce(self._account.address)

    def _deliver_all(
        self,
        entries: Sequence[Waiting],
    ) -> list[Waiting]:
        """Send unaccepted transactions in one batch; those that are refused keep `sent_at` 0."""
        open_entries = [entry for entry in entries if not entry.sent_at]
        taken = self._coordinator.send_all_raw([entry.raw for entry in open_entries])
        sent: dict[int, Waiting] = {}
        for entry, is_taken in zip(open_entries, taken, strict=True):
            if is_taken:
                sent[entry.nonce] = self._note_sent(entry)
        return [sent.get(entry.nonce, entry) for entry in entries]

    def _deliver_new(self, entry: Waiting) -> Waiting:
        """Send the transaction at the required price, with another nonce if its own is used."""
        for _ in range(_NONCE_ATTEMPTS):
            try:
                return self._deliver_at_any_price(entry)
            except NonceUsed as used:
                entry = self.find(entry.call) or entry  # its price may have been raised
                log.warning(
                    "nonce used by another sender account=%s error=%s", self._account.address, used
                )
                nonce = max(
                    entry.nonce + 1,
                    self._next_nonce(),
                    self._coordinator.nonce(self._account.address),
                )
                entry = self._priced(entry, nonce, entry.price_wei)
            except ChainUnreachable:
                raise  # it may have arrived, so it stays in the journal
            except ChainError:
                self._forget(entry)
                raise
        self._forget(entry)
        raise ChainError(
            f"{entry.name}: {_NONCE_ATTEMPTS} nonces up to {entry.nonce} of {self._account.address}"
            " are used by others; let only one account service send for an account"
        )

    def _deliver_at_any_price(self, entry: Waiting) -> Waiting:
        """Send the transaction; a refused price is raised as far as the settings allow."""
        while True:
            try:
                return self._deliver(entry)
            except Underpriced as refused:
                entry = self._priced(
                    entry, entry.nonce, self._coordinator.raised_price(entry.price_wei, refused)
                )

    def _priced(
        self,
        entry: Waiting,
        nonce: int,
        price_wei: int,
    ) -> Waiting:
        """Sign the transaction again with this nonce and price, and update the journal."""
        again = self._signed(entry.call, nonce, entry.gas, price_wei)
        self._journal.execute(
            "UPDATE waiting SET nonce = ?, price_wei = ?, hash = ?, raw = ?, sent_at = 0 WHERE"
            " nonce = ?",
            (nonce, price_wei, again.hash, again.raw, entry.nonce),
        )
        return again

    def _deliver(self, entry: Waiting) -> Waiting:
        """Send the transaction to the chain, unless a node has accepted it."""
        if entry.sent_at:
            return entry
        self._coordinator.send_raw(entry.raw)
        return self._note_sent(entry)

    def _note_sent(self, entry: Waiting) -> Waiting:
        now = time.time()
        self._journal.execute("UPDATE waiting SET sent_at = ? WHERE nonce = ?", (now, entry.nonce))
        return replace(entry, sent_at=now)

    def _forget(self, entry: Waiting) -> None:
        self._journal.execute("DELETE FROM waiting WHERE nonce = ?", (entry.nonce,))

    def _send_stuck(
        self,
        waiting: list[Waiting],
        count: int,
    ) -> None:
        """Resend stuck transactions; if nonces are missing, renumber from `count` and resend all.

        Nonces are missing if the chain has lost mined transactions; later ones would wait forever.
        """
        oldest = waiting[0].nonce
        has_gap = waiting[-1].nonce != count + len(waiting) - 1
        if has_gap:
            log.warning(
                "nonce gap, renumbering transactions chain=%d ours=%d count=%d",
                count,
                oldest,
                len(waiting),
            )
        now_wei = self._coordinator.gas_price()
        for nonce, entry in enumerate(waiting, count):
            if has_gap or _is_stuck(entry):
                self._send_again(entry, nonce, now_wei)

    def _send_again(
        self,
        entry: Waiting,
        nonce: int,
        now_wei: int,
    ) -> None:
        price_wei = entry.price_wei
        if entry.sent_at:
            price_wei = self._next_price(price_wei, now_wei)
        # Nonces only move down, the lowest first, so the new nonce is free.
        again = self._priced(entry, nonce, price_wei)
        log.info(
            "sending again call=%s nonce=%d price_wei=%d hash=%s",
            again.name,
            nonce,
            price_wei,
            again.hash,
        )
        try:
            self._deliver_at_any_price(again)
        except ReplacementUnderpriced:
            # Most likely this call at an earlier price is pending: next time, pay more.
            self._priced(again, nonce, self._next_price(price_wei, now_wei))
            log.info("nonce has a pending transaction nonce=%d hash=%s", nonce, again.hash)
        except NonceUsed:
            # This transaction or another sender's was mined: the chain's count passes the nonce,
            # and `tend` forgets it.
            log.info("nonce used nonce=%d hash=%s", nonce, again.hash)

    def _next_price(self, price_wei: int, now_wei: int) -> int:
        """Return the price of a replacement for `price_wei`; the same if the bound is reached."""
        limit_wei = self._coordinator.price_limit(now_wei)
        if price_wei >= limit_wei:
            return price_wei
        return min(limit_wei, max(now_wei, int(price_wei * _PRICE_STEP) + 1))

    def _signed(
        self,
        call: Call,
        nonce: int,
        gas: int,
        price_wei: int,
    ) -> Waiting:
        tx_hash, raw = self._coordinator.sign(
            self._account, call, nonce=nonce, gas=gas, gas_price_wei=price_wei
        )
        return Waiting(nonce, call.name, call.to, call.data, gas, price_wei, tx_hash, raw, 0.0)

    def _write(self, entry: Waiting) -> None:
        self._journal.execute(
            "INSERT INTO waiting VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            astuple(entry),
        )


def _is_stuck(entry: Waiting) -> bool:
    return entry.sent_at < time.time() - STUCK_SECONDS
