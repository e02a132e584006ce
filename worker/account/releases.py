"""Releases: consents of accounts that other accounts take their nodes, stored until they do."""

import time
from dataclasses import dataclass

from worker.account.accounts import Account, Accounts, Run

RELEASE_SECONDS = 7 * 24 * 3600.0
"""Seconds in which the other account may take a node."""
_NEVER = 1e12
"""A time in the very distant future, in Unix seconds, for releases that do not expire."""

_SELECT = (
    "SELECT peer_id, from_id, holder.address, to_id, taker.address, signature, expires_at FROM"
    " releases JOIN accounts AS holder ON holder.id = from_id JOIN accounts AS taker ON taker.id ="
    " to_id WHERE expires_at > ? AND "
)


@dataclass(frozen=True, slots=True)
class Release:
    """A node's holder (`from`) lets another account (`to`) take the node.

    `signature`: the holder's, for the contract; None: the chain did not know the node.
    """

    peer_id: str
    from_id: int
    from_address: str
    to_id: int
    to_address: str
    signature: bytes | None
    expires_at: float


def keep(
    accounts: Accounts,
    peer_id: str,
    holder: Account,
    taker: Account,
    signature: bytes | None,
) -> None:
    """Store a release, which replaces an earlier one of the same node."""
    accounts.database.execute(
        "INSERT OR REPLACE INTO releases VALUES (?, ?, ?, ?, ?)",
        (peer_id, holder.id, taker.id, signature, time.time() + RELEASE_SECONDS),
    )


def release_all(
    run: Run,
    holder_id: int,
    taker_id: int,
) -> None:
    """Release all nodes of an account without a person; these releases do not expire.

    `run` runs a statement of a transaction. The service signs for the holder when they are taken.
    """
    run(
        "INSERT OR REPLACE INTO releases SELECT peer_id, account_id, ?, NULL, ? FROM nodes WHERE"
        " account_id = ?",
        (taker_id, _NEVER, holder_id),
    )


def forget(
    accounts: Accounts,
    peer_id: str,
    account: Account,
) -> None:
    """Remove the release of a node, which its holder withdraws or its taker refuses."""
    accounts.database.execute(
        "DELETE FROM releases WHERE peer_id = ? AND (from_id = ? OR to_id = ?)",
        (peer_id, account.id, account.id),
    )


def releases_by(accounts: Accounts, account: Account) -> dict[str, Release]:
    """Return the releases by the account, by peer id."""
    return {each.peer_id: each for each in _select(accounts, "from_id = ?", account.id)}


def releases_to(accounts: Accounts, account: Account) -> list[Release]:
    """Return the releases to the account."""
    return _select(accounts, "to_id = ?", account.id)


def _select(
    accounts: Accounts,
    condition: str,
    value: int,
) -> list[Release]:
    rows = accounts.database.execute(
        f"{_SELECT}{condition} ORDER BY peer_id",
        (time.time(), value),
    )
    return [Release(*row) for row in rows]
