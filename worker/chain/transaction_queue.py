"""One queue of transactions per account: it alone gives out nonces, so that senders never replace
each other's.

A transaction is in the journal before it is sent, and leaves it when the chain has mined its nonce.
So the next nonce follows from the journal, or from the chain when the journal is empty, and a
restart knows what is on its way. What became of a transaction is not decided here: chain.settlement
reads that from the contract, and a second transaction for the same thing is refused there.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from eth_account.signers.local import LocalAccount

from worker.chain.client import Call, NonceUsed, ReplacementUnderpriced, Underpriced
from worker.chain.coordinator import Coordinator
from worker.chain.database import Database
from worker.errors import ChainError, ChainUnreachable, WorkerError

log = logging.getLogger(__name__)

# A transaction that is not mined after this time is sent again, at a higher price where the chain
# has prices.
STUCK_SECONDS = 20.0
# How often a nonce that somebody else used is stepped over in one send.
_NONCE_ATTEMPTS = 32
# Nodes take a replacement from 10% above the price of the one waiting.
_PRICE_STEP = 1.125
_PRICE_SECONDS = 1.0
"""For so long a price that was read is used again."""

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS waiting (
        nonce INTEGER PRIMARY KEY, name TEXT NOT NULL, address TEXT, data BLOB NOT NULL, gas INTEGER NOT NULL,
        price_wei INTEGER NOT NULL, hash TEXT NOT NULL, raw BLOB NOT NULL, sent_at REAL NOT NULL
    ) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A transaction that is signed and not known to be mined. `sent_at`: Unix seconds, 0 while no
    node has taken it."""

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
    """Sends for `account`; `journal` is the file that remembers what is on its way. Any number of
    threads may send.

    Somebody must call `tend` every few seconds. One Sender per account: another one would give out
    the same nonces.
    """

    def __init__(self, coordinator: Coordinator, account: LocalAccount, journal: Path) -> None:
        self._coordinator = coordinator
        self._account = account
        self._lock = threading.Lock()
        self._door = threading.Lock()
        self._arrived: dict[Call, Future[Waiting]] = {}
        """Calls that nobody sends yet, for those who wait for them."""
        self._price_read = (float("-inf"), 0)
        self._journal = Database(journal, _SCHEMA, "NORMAL")
        # Which of them a node took is not known after a restart.
        self._journal.execute("UPDATE waiting SET sent_at = 0")

    def send(self, call: Call) -> str:
        """Try the call on the chain's present state, send it, and return the transaction's hash.

        The same call while it is waiting is the same transaction. Calls that come while others are
        being sent go out together after them. Raises ContractRefused if the contract would refuse
        it now; ChainUnreachable if no node took it, in which case it may still be sent later.
        """
        self._coordinator.ensure_checked()
        with self._door:
            outcome = self._arrived.setdefault(call, Future())
        with self._lock:
            if not outcome.done():
                self._send_arrived()
        return outcome.result().hash

    def tend(self) -> int:
        """Forget what is mined, send again what is stuck. Returns how many transactions are still
        on their way.

        Raises ChainError, ChainUnreachable if it can't; nothing is lost by that.
        """
        with self._lock:
            if not self.waiting():
                return 0
            count = self._coordinator.nonce(self._account.address)
            self._journal.execute("DELETE FROM waiting WHERE nonce < ?", (count,))
            waiting = self.waiting()
            if any(_is_stuck(entry) for entry in waiting):
                self._send_stuck(waiting, count)
            return len(waiting)

    def waiting(self) -> list[Waiting]:
        """Return what is on its way, in the order of nonces."""
        return [
            Waiting(*row) for row in self._journal.execute("SELECT * FROM waiting ORDER BY nonce")
        ]

    def close(self) -> None:
        self._journal.close()

    def _price(self) -> int:
        """Return what the chain asked for a moment ago: many calls at once need not ask each."""
        read_at, price_wei = self._price_read
        if time.monotonic() - read_at > _PRICE_SECONDS:
            price_wei = self._coordinator.allowed_price()
            self._price_read = time.monotonic(), price_wei
        return price_wei

    def _send_arrived(self) -> None:
        """Whoever comes first sends for all that have come by now."""
        with self._door:
            arrived, self._arrived = self._arrived, {}
        try:
            for call, outcome in self._send_all(list(arrived)):
                if isinstance(outcome, WorkerError):
                    arrived[call].set_exception(outcome)
                else:
                    arrived[call].set_result(outcome)
        finally:
            for call, future in arrived.items():
                if not future.done():
                    future.set_exception(
                        ChainError(f"{call.name}: not sent, as another call failed; send it again")
                    )

    def _send_all(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Waiting | WorkerError]]:
        """Return what comes of each call. With as few requests to the chain as can be: it is asked
        for many at once."""
        known = {call: entry for call in calls if (entry := self._find(call))}
        entries, new = list(known.values()), [call for call in calls if call not in known]
        to_sign: list[tuple[Call, int]] = []
        for call, gas in zip(
            new, self._coordinator.estimate_all(self._account.address, new), strict=True
        ):
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
                # It may have arrived, and stays in the journal; the others are not waited for as
                # long again.
                yield entry.call, failure or self._deliver_new(entry)
            except ChainUnreachable as error:
                failure = error
                yield entry.call, error
            except WorkerError as error:
                yield entry.call, error

    def _find(self, call: Call) -> Waiting | None:
        found = self._journal.execute(
            "SELECT * FROM waiting WHERE data = ? AND address IS ?", (call.data, call.to)
        )
        return Waiting(*found[0]) if found else None

    def _sign_all(self, calls: Sequence[tuple[Call, int]]) -> list[Waiting]:
        """Sign the calls (with their gas) under the next nonces, and write them down."""
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
        return self._coordinator.nonce(self._account.address) if last is None else last + 1

    def _deliver_all(self, entries: Sequence[Waiting]) -> list[Waiting]:
        """Hand over what no node has taken, all at once; what is not taken then has no `sent_at`
        still."""
        open_entries = [entry for entry in entries if not entry.sent_at]
        taken = self._coordinator.send_all_raw([entry.raw for entry in open_entries])
        sent = {
            e.nonce: self._note_sent(e)
            for e, is_taken in zip(open_entries, taken, strict=True)
            if is_taken
        }
        return [sent.get(entry.nonce, entry) for entry in entries]

    def _deliver_new(self, entry: Waiting) -> Waiting:
        """Hand the transaction over, under another nonce if somebody else has used its own, at the
        price it takes."""
        for _ in range(_NONCE_ATTEMPTS):
            try:
                return self._deliver_at_any_price(entry)
            except NonceUsed as used:
                entry = self._find(entry.call) or entry  # its price may have been raised
                self._forget(entry)
                log.warning(
                    "nonce used by somebody else account=%s error=%s", self._account.address, used
                )
                nonce = max(
                    entry.nonce + 1,
                    self._next_nonce(),
                    self._coordinator.nonce(self._account.address),
                )
                entry = self._signed(entry.call, nonce, entry.gas, entry.price_wei)
                self._write(entry)
            except ChainUnreachable:
                raise  # it may have arrived: it stays in the journal
            except ChainError:
                self._forget(entry)
                raise
        self._forget(entry)
        raise ChainError(
            f"{entry.name}: {_NONCE_ATTEMPTS} nonces up to {entry.nonce} of {self._account.address}"
            " are used by others; let only one account service send for an account"
        )

    def _deliver_at_any_price(self, entry: Waiting) -> Waiting:
        """Hand the transaction over; a price that is refused is raised as far as the settings
        allow."""
        while True:
            try:
                return self._deliver(entry)
            except Underpriced as refused:
                entry = self._priced(
                    entry, entry.nonce, self._coordinator.raised_price(entry.price_wei, refused)
                )

    def _priced(self, entry: Waiting, nonce: int, price_wei: int) -> Waiting:
        """The transaction signed with this nonce and price, in place of what the journal has for
        it."""
        again = self._signed(entry.call, nonce, entry.gas, price_wei)
        self._journal.execute(
            "UPDATE waiting SET nonce = ?, price_wei = ?, hash = ?, raw = ?, sent_at = 0 WHERE"
            " nonce = ?",
            (nonce, price_wei, again.hash, again.raw, entry.nonce),
        )
        return again

    def _deliver(self, entry: Waiting) -> Waiting:
        """Hand the transaction to the chain, unless a node has taken it."""
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

    def _send_stuck(self, waiting: list[Waiting], count: int) -> None:
        """Send again what is stuck; all of it, from nonce `count` on, if nonces are missing in
        between.

        They are missing when the chain forgot transactions that it had mined: the later ones would
        wait forever.
        """
        has_gap = waiting[-1].nonce != count + len(waiting) - 1
        if has_gap:
            log.warning(
                "nonce gap chain=%d ours=%d: numbering %d again",
                count,
                waiting[0].nonce,
                len(waiting),
            )
        now_wei = self._coordinator.gas_price()
        for nonce, entry in enumerate(waiting, count):
            if has_gap or _is_stuck(entry):
                self._send_again(entry, nonce, now_wei)

    def _send_again(self, entry: Waiting, nonce: int, now_wei: int) -> None:
        price_wei = self._next_price(entry.price_wei, now_wei) if entry.sent_at else entry.price_wei
        # Nonces only ever move down, lowest first, so the place is free.
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
            # What waits there is most likely this call at an earlier price: a higher one is tried
            # next time.
            self._priced(again, nonce, self._next_price(price_wei, now_wei))
            log.info(
                "another one waits with the nonce, to be outbid nonce=%d hash=%s", nonce, again.hash
            )
        except NonceUsed:
            # Mined meanwhile, or somebody else's is: either way the chain's count passes it, and
            # `tend` forgets it.
            log.info("nonce used nonce=%d hash=%s", nonce, again.hash)

    def _next_price(self, price_wei: int, now_wei: int) -> int:
        """The price to replace one of `price_wei` with; the same where the bound is reached."""
        limit_wei = self._coordinator.price_limit(now_wei)
        if price_wei >= limit_wei:
            return price_wei
        return min(limit_wei, max(now_wei, int(price_wei * _PRICE_STEP) + 1))

    def _signed(self, call: Call, nonce: int, gas: int, price_wei: int) -> Waiting:
        tx_hash, raw = self._coordinator.sign(
            self._account, call, nonce=nonce, gas=gas, gas_price_wei=price_wei
        )
        return Waiting(nonce, call.name, call.to, call.data, gas, price_wei, tx_hash, raw, 0.0)

    def _write(self, entry: Waiting) -> None:
        self._journal.execute(
            "INSERT INTO waiting VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                entry.nonce, entry.name, entry.address, entry.data, entry.gas, entry.price_wei,
                entry.hash, entry.raw, entry.sent_at,
            ),
        )  # fmt: skip


def _is_stuck(entry: Waiting) -> bool:
    return entry.sent_at < time.time() - STUCK_SECONDS
