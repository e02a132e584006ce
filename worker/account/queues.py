"""One queue of transactions per account, each with a journal of its own."""

import threading
from collections.abc import Callable
from pathlib import Path

from eth_account.signers.local import LocalAccount

from worker.account.accounts import Account
from worker.chain.coordinator import Coordinator
from worker.chain.transaction_queue import Sender, Waiting
from worker.errors import ChainUnreachable, WorkerError

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

    def of(self, account: Account) -> Sender:
        with self._lock:
            if account.id not in self._senders:
                key = self._key_of(account)
                self._senders[account.id] = Sender(self._coordinator, key, self._journal(account))
            return self._senders[account.id]

    def open_journals(self, accounts: list[Account]) -> None:
        """Open the queues that may have pending transactions from before a restart."""
        for account in accounts:
            if self._journal(account).exists():
                self.of(account)

    def waiting(self, account: Account) -> list[Waiting]:
        """Return the account's pending transactions."""
        return self.of(account).waiting() if self._journal(account).exists() else []

    def forget(self, account: Account) -> None:
        """Remove the queue of a deleted account, which has nothing pending."""
        with self._lock:
            sender = self._senders.pop(account.id, None)
        if sender is not None:
            sender.close()
        journal = self._journal(account)
        for suffix in ("", "-wal", "-shm"):
            journal.with_name(journal.name + suffix).unlink(missing_ok=True)

    def tend(self) -> int:
        """Tend all queues, and return the number of transactions still pending.

        Raises ChainUnreachable at once; another error of one queue after the others are tended.
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

    def close(self) -> None:
        with self._lock:
            for sender in self._senders.values():
                sender.close()

    def _journal(self, account: Account) -> Path:
        if account.is_operator:
            return self._folder / OPERATOR_JOURNAL
        return self._folder / _JOURNALS / f"{account.address}.db"
