"""Find the states of a page's transactions, in the account's queue or in the chain's receipts.

A transaction that is sent again with another price or nonce has a new hash each time, and any of
these may be mined.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from worker.account.accounts import Account, Accounts, Transaction
from worker.account.queues import Queues
from worker.chain.coordinator import Coordinator
from worker.errors import ChainError

WAITING, CONFIRMED, FAILED = "waiting", "confirmed", "failed"
NOT_FOUND = "not on the chain"
"""Another transaction has used its nonce, or the chain no longer has its receipt."""
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
    """Return the rows of an account's transactions; final states are looked up only once."""
    pending = queues.pending(account)
    has_answer = True
    rows = []
    for each in transactions:
        state, tx_hash = each.state, each.hash
        if state is None and tx_hash in pending:
            state, tx_hash = WAITING, pending[tx_hash].hash
        elif state is None:
            hashes = queues.hashes(account, tx_hash)
            state, tx_hash = UNKNOWN, hashes[-1]
            if has_answer:  # otherwise each row would wait for the chain
                try:
                    state, tx_hash = _find(hashes, coordinator)
                except ChainError:
                    has_answer = False
            if state in (CONFIRMED, FAILED):
                accounts.note_mined(replace(each, state=state, hash=tx_hash))
        rows.append(Row(each, state, tx_hash))
    return rows


def _find(hashes: Sequence[str], coordinator: Coordinator) -> tuple[str, str]:
    """Return the state of the transaction with these hashes, and the hash that was mined."""
    for tx_hash in reversed(hashes):
        receipt = coordinator.receipt(tx_hash)
        if receipt is not None:
            return CONFIRMED if receipt.succeeded else FAILED, tx_hash
    return NOT_FOUND, hashes[-1]
