"""What became of the transactions on a page: by the account's queue, else by the chain's receipts.

A transaction that is sent again at another price, or under another nonce, has another hash each
time, and any of them may be the one that is mined.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from worker.account.accounts import Account, Accounts, Transaction
from worker.account.queues import Queues
from worker.chain.coordinator import Coordinator
from worker.errors import ChainError

WAITING, CONFIRMED, FAILED = "waiting", "confirmed", "failed"
NOT_FOUND = "not on the chain"
"""Another transaction took its nonce, or the chain no longer has receipts of its time."""
UNKNOWN = "not known"
"""The chain does not answer."""


@dataclass(frozen=True, slots=True)
class Row:
    """A transaction with its state, and the hash by which others find it."""

    transaction: Transaction
    state: str
    hash: str


def rows_of(
    transactions: Sequence[Transaction],
    account: Account,
    accounts: Accounts,
    queues: Queues,
    coordinator: Coordinator,
) -> list[Row]:
    """Return the rows of an account's transactions; what is final is looked up once."""
    pending = queues.pending(account)
    rows = []
    for each in transactions:
        if each.state is not None:
            rows.append(Row(each, each.state, each.hash))
        elif each.hash in pending:
            rows.append(Row(each, WAITING, pending[each.hash].hash))
        else:
            row = _mined(each, queues.hashes(account, each.hash), coordinator)
            if row.state in (CONFIRMED, FAILED):
                accounts.note_mined(replace(each, state=row.state, hash=row.hash))
            rows.append(row)
    return rows


def _mined(
    transaction: Transaction,
    hashes: Sequence[str],
    coordinator: Coordinator,
) -> Row:
    try:
        for tx_hash in reversed(hashes):
            receipt = coordinator.receipt(tx_hash)
            if receipt is not None:
                return Row(transaction, CONFIRMED if receipt.succeeded else FAILED, tx_hash)
    except ChainError:
        return Row(transaction, UNKNOWN, hashes[-1])
    return Row(transaction, NOT_FOUND, hashes[-1])
