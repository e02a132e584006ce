"""One queue of transactions per account, each with its own journal."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from eth_account.signers.local import LocalAccount

from worker.account.accounts import Account
from worker.account.request_bodies import Refused
from worker.chain.client import Call
from worker.chain.coordinator import Coordinator
from worker.chain.queue_status import STATUS_FILE, QueuesStatus, QueueState
from worker.chain.transaction_queue import Sender, Waiting
from worker.errors import ChainUnreachable, WorkerError
from worker.log import discreet, printable
from worker.runtime.files import write_whole

OPERATOR_JOURNAL = "journal.db"
_JOURNALS = "journals"


class Queues:
    """The senders of all accounts; one is opened when its account first sends. Thread-safe."""

    def __init__(
        self,
        coordinator: Coordinator,
        folder: Path,
        key_of: Callable[[Account], LocalAccount],
    ) -> None:
        self._coordinator = coordinator
        self._folder = folder
        self._key_of = key_of
        self._lock = threading.Lock()
        self._senders: dict[int, Sender] = {}
        self._ended: set[int] = set()
        """Accounts that are deleted, or are being deleted."""

    def of(self, account: Account) -> Sender:
        with self._lock:
            if account.id in self._ended:
                raise Refused(404, "AccountGone", "the account is being deleted")
            if account.id not in self._senders:
                key = self._key_of(account)
                self._senders[account.id] = Sender(self._coordinator, key, self._journal(account))
            return self._senders[account.id]

    def send(
        self,
        account: Account,
        call: Call,
        note: Callable[[str], object],
    ) -> str:
        """Send the account's call as `Sender.send` does, and return the transaction's hash.

        `note` is called with the first hash of the transaction, even if it is sent only later.
        """
        queue = self.of(account)
        try:
            tx_hash = queue.send(call)
        except ChainUnreachable:
            if (pending := queue.find(call)) is not None:
                note(queue.hashes(pending.hash)[0])
            raise
        note(queue.hashes(tx_hash)[0])
        return tx_hash

    def open_journals(self, accounts: list[Account]) -> None:
        """Open the queues that may have pending transactions from before a restart."""
        for account in accounts:
            if self._journal(account).exists():
                self.of(account)

    def waiting(self, account: Account) -> list[Waiting]:
        """Return the account's pending transactions."""
        return self.of(account).waiting() if self._journal(account).exists() else []

    def pending(self, account: Account) -> dict[str, Waiting]:
        """Return the account's pending transactions by their first hashes."""
        return self.of(account).pending() if self._journal(account).exists() else {}

    def hashes(
        self,
        account: Account,
        tx_hash: str,
    ) -> list[str]:
        """Return all hashes that the account's transaction had, in order."""
        return self.of(account).hashes(tx_hash) if self._journal(account).exists() else [tx_hash]

    @contextmanager
    def ended(self, account: Account) -> Iterator[bool]:
        """Close the queue of an account for its deletion; yield False if anything is pending.

        No transaction is sent for the account from then on, unless the block raises an exception.
        """
        with self._lock:
            self._ended.add(account.id)
            sender = self._senders.get(account.id)
        try:
            is_idle = sender is None or sender.close_if_idle()
            if is_idle:
                with self._lock:
                    self._senders.pop(account.id, None)
            yield is_idle
        except BaseException:
            with self._lock:
                self._ended.discard(account.id)
            raise

    def remove_journals(self, addresses: Iterable[str]) -> None:
        """Remove the journals of deleted accounts, even after an interrupted deletion."""
        for address in addresses:
            journal = self._journal_at(address)
            for suffix in ("", "-wal", "-shm"):
                journal.with_name(journal.name + suffix).unlink(missing_ok=True)

    def tend(self) -> int:
        """Tend all queues, and return the number of transactions still pending.

        Raises ChainUnreachable at once; other errors of a queue after all queues were tended.
        """
        with self._lock:
            senders = list(self._senders.values())
        num_waiting = 0
        failure: WorkerError | None = None
        for sender in senders:
            try:
                num_waiting += sender.tend()
            except ChainUnreachable:
                raise
            except WorkerError as error:
                failure = error
        if failure is not None:
            raise failure
        return num_waiting

    def write_status(self) -> None:
        """Write the state of all open queues for the endpoint of Prometheus."""
        with self._lock:
            state = sum((sender.state() for sender in self._senders.values()), QueueState())
        error = None if state.last_error is None else printable(discreet(state.last_error))
        status = asdict(QueuesStatus(time.time(), replace(state, last_error=error)))
        file = self._folder / STATUS_FILE
        try:
            write_whole(file, json.dumps(status) + "\n", durable=False)
        except OSError as failure:
            raise WorkerError(f"{file}: {failure.strerror}; make room, or grant access") from None

    def close(self) -> None:
        with self._lock:
            for sender in self._senders.values():
                sender.close()

    def _journal(self, account: Account) -> Path:
        if account.is_operator:
            return self._folder / OPERATOR_JOURNAL
        return self._journal_at(account.address)

    def _journal_at(self, address: str) -> Path:
        return self._folder / _JOURNALS / f"{address}.db"
