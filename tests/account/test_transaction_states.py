"""States of transactions on a page: waiting, confirmed or failed, whichever hash was mined."""

import pytest

from worker.account.accounts import Account, Accounts
from worker.account.transaction_states import rows_of
from worker.chain.client import Receipt
from worker.chain.transaction_queue import Waiting
from worker.errors import ChainUnreachable


class Chain:
    """The queue and the chain of a test, in the place of `Queues` and `Coordinator`."""

    def __init__(self) -> None:
        self.waiting: dict[str, str] = {}
        """Present hashes of what waits, by their first ones."""
        self.others: dict[str, list[str]] = {}
        self.mined: dict[str, bool] = {}
        self.is_away = False
        self.asked: list[str] = []

    def pending(self, account: Account) -> dict[str, Waiting]:
        return {
            first: Waiting(0, "call", None, b"", 0, 0, now, b"", 0.0)
            for first, now in self.waiting.items()
        }

    def hashes(self, account: Account, tx_hash: str) -> list[str]:
        return [tx_hash, *self.others.get(tx_hash, [])]

    def receipt(self, tx_hash: str) -> Receipt | None:
        self.asked.append(tx_hash)
        if self.is_away:
            raise ChainUnreachable("no answer")
        succeeded = self.mined.get(tx_hash)
        return None if succeeded is None else Receipt(tx_hash, 1, succeeded, 1, None)


@pytest.fixture
def ada(accounts: Accounts) -> Account:
    return accounts.create("ada@example.org", 3)


def shown(accounts: Accounts, account: Account, chain: Chain) -> list[tuple[str, str]]:
    """Return state and hash of the account's transactions, the oldest first."""
    found = accounts.transactions(account, 50)
    rows = rows_of(found, account, accounts, chain, chain)  # type: ignore[arg-type]
    return [(row.state, row.hash) for row in reversed(rows)]


def test_transaction_is_shown_with_the_hash_that_it_has_now(
    accounts: Accounts, ada: Account
) -> None:
    chain = Chain()
    for tx_hash in ("0x1", "0x2", "0x3"):
        accounts.note_sent(ada, "QmAda1", "submitReward", tx_hash, 1)
    chain.waiting = {"0x1": "0x1b", "0x2": "0x2", "0x3": "0x3"}
    assert shown(accounts, ada, chain) == [
        ("waiting", "0x1b"),
        ("waiting", "0x2"),
        ("waiting", "0x3"),
    ]
    # Of the first, the earlier price was mined after all; of the third, the new nonce, reverted.
    chain.waiting = {}
    chain.others = {"0x1": ["0x1b"], "0x3": ["0x3b"]}
    chain.mined = {"0x1": True, "0x2": False, "0x3b": True}
    expected = [("confirmed", "0x1"), ("failed", "0x2"), ("confirmed", "0x3b")]
    assert shown(accounts, ada, chain) == expected
    # What is final is not asked for again, also when the chain has forgotten it.
    chain.mined, chain.asked = {}, []
    assert shown(accounts, ada, chain) == expected
    assert chain.asked == []


def test_transaction_without_a_receipt_is_not_said_to_be_on_the_chain(
    accounts: Accounts, ada: Account
) -> None:
    chain = Chain()
    accounts.note_sent(ada, "QmAda1", "submitReward", "0x1", 1)
    chain.is_away = True
    assert shown(accounts, ada, chain) == [("not known", "0x1")]
    chain.is_away = False
    assert shown(accounts, ada, chain) == [("not on the chain", "0x1")]
    chain.mined = {"0x1": True}
    assert shown(accounts, ada, chain) == [("confirmed", "0x1")]


def test_chain_that_is_away_is_asked_once_for_all_rows(accounts: Accounts, ada: Account) -> None:
    chain = Chain()
    chain.is_away = True
    for number in range(9):
        accounts.note_sent(ada, "QmAda1", "submitReward", f"0x{number}", 1)
    assert {state for state, _ in shown(accounts, ada, chain)} == {"not known"}
    assert len(chain.asked) == 1


def test_same_transaction_is_listed_once(accounts: Accounts, ada: Account) -> None:
    """A node sends again what was answered 503, and it is the same transaction."""
    for round in (4, 5):
        accounts.note_sent(ada, "QmAda1", "submitReward", "0x1", round)
    assert [each.hash for each in accounts.transactions(ada, 9)] == ["0x1"]
