"""Accounts and their nodes, in the service's database.

The operator's account is the fleet's: its key is in `account.key`, and its nodes' tokens are HMACs
(vault.py). Other accounts belong to people: their keys are encrypted in the database, and their
nodes' tokens are random, stored as hashes, and expire when they are not used.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eth_account import Account as EthAccount
from eth_account.signers.local import LocalAccount

from worker.account.migrations import MIGRATIONS
from worker.account.request_bodies import Refused
from worker.account.sealing import Seal, load_seal
from worker.account.vault import Tokens
from worker.chain.database import Database
from worker.errors import SecretError
from worker.swarm import identity

Run = Callable[..., list[tuple[Any, ...]]]
"""Function that runs a statement, alone or as a part of a transaction."""

DATABASE_FILE = "accounts.db"
OPERATOR_ID = 1
TOKEN_SECONDS = 90 * 24 * 3600.0
"""A node's token expires if it is not used for this many seconds."""
MAX_NAME = 40
_TOUCH_SECONDS = 60.0
"""Seconds between two updates of a token's last use."""
_NO_REMAINS = "PRAGMA secure_delete = ON"
"""Overwrites deleted and changed data, which SQLite would leave in free pages."""
_REVOKE = "UPDATE nodes SET revoked_at = ?, token_hash = NULL, token_expires_at = NULL"
_KEPT_TRANSACTIONS = 1000
"""Number of newest transactions that an account's page can show."""

_OF_AN_ACCOUNT = (
    "nodes",
    "transactions",
    "sessions",
    "known_browsers",
    "passkeys",
    "devices",
    "invitations",
)
"""Tables whose rows are deleted with their account."""

_SELECT_ACCOUNTS = (
    "SELECT id, org_id, address, email, max_nodes, created_at, suspended_at FROM accounts WHERE "
)
_SELECT_NODES = (
    "SELECT peer_id, account_id, name, linked_at, seen_at, last_round, token_expires_at, revoked_at"
    " FROM nodes WHERE "
)


@dataclass(frozen=True, slots=True)
class Account:
    """An account. Times are Unix seconds. `email` None: no person has signed in to it."""

    id: int
    org_id: str
    address: str
    email: str | None
    max_nodes: int
    created_at: float
    suspended_at: float | None

    @property
    def is_operator(self) -> bool:
        return self.id == OPERATOR_ID

    @property
    def is_nobodys(self) -> bool:
        """Return whether it is an invitation's account that no person has signed in to."""
        return self.email is None and not self.is_operator


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is linked to an account. Times are Unix seconds, None: never."""

    peer_id: str
    account_id: int
    name: str
    linked_at: float
    seen_at: float | None
    last_round: int | None
    token_expires_at: float | None
    revoked_at: float | None

    @property
    def has_access(self) -> bool:
        """Return whether a token of the node can be valid."""
        expires_at = self.token_expires_at
        return self.revoked_at is None and (expires_at is None or expires_at > time.time())


@dataclass(frozen=True, slots=True)
class Transaction:
    """A transaction that was, or will be, sent for a node.

    `hash`: that of the mined transaction, or else its first hash; `state`: "confirmed" or "failed",
    None until a page has looked it up.
    """

    id: int
    peer_id: str
    call: str
    hash: str
    sent_at: float
    state: str | None


class Accounts:
    """The accounts in `folder`. Thread-safe; other processes may use the file too."""

    def __init__(
        self,
        folder: Path,
        operator: LocalAccount,
        org_id: str,
        passphrase: str | None,
    ) -> None:
        """Open the database; migrate the operator's account from versions without a database.

        `passphrase` None: people have no accounts here. Raises SecretError if it is not the one
        used before, ResourceError if the file can't be used.
        """
        self.database = Database(folder / DATABASE_FILE, _NO_REMAINS, "FULL")
        self.database.migrate(MIGRATIONS)
        (folder / DATABASE_FILE).chmod(0o600)
        # Data about transactions and use is written often and need not survive a power failure.
        self._history = Database(folder / DATABASE_FILE, _NO_REMAINS, "NORMAL")
        self._operator_key = operator
        self._operator_tokens = Tokens(folder)
        self._seal: Seal | None = None
        if passphrase is not None:
            self._seal = load_seal(self.database, passphrase)
        self._keep_operator(str(operator.address), org_id)

    @property
    def has_people(self) -> bool:
        """Return whether people can have accounts."""
        return self._seal is not None

    def close(self) -> None:
        self.database.close()
        self._history.close()

    # ---- accounts

    @property
    def operator(self) -> Account:
        return self.by_id(OPERATOR_ID)

    def by_id(
        self,
        account_id: int,
        run: Run | None = None,
    ) -> Account:
        found = self._find("id = ?", account_id, run)
        if found is None:
            raise Refused(404, "AccountGone", "the account was deleted")
        return found

    def by_org(self, org_id: str) -> Account | None:
        return self._find("org_id = ?", org_id)

    def by_address(self, address: str) -> Account | None:
        return self._find("address = ? COLLATE NOCASE", address)

    def by_email(
        self,
        email: str,
        run: Run | None = None,
    ) -> Account | None:
        return self._find("email = ?", email, run)

    def all(self) -> list[Account]:
        """Return all accounts that are not deleted, the operator's first."""
        rows = self.database.execute(_SELECT_ACCOUNTS + "deleted_at IS NULL ORDER BY id")
        return [Account(*row) for row in rows]

    def create(
        self,
        email: str | None,
        max_nodes: int,
        run: Run | None = None,
    ) -> Account:
        """Create an account with its own key; `run`: runs the statement in a transaction."""
        if self._seal is None:
            raise Refused(403, "AccountsClosed", "account.passphrase_file is not set at the host")
        key: LocalAccount = EthAccount.create()
        address = str(key.address)
        values = (
            f"account-{secrets.token_hex(6)}",
            address,
            self._seal.close(bytes(key.key), address),
            email,
            max_nodes,
            time.time(),
        )
        with self.database.transaction() if run is None else nullcontext(run) as execute:
            execute(
                "INSERT INTO accounts (org_id, address, sealed_key, email, max_nodes, created_at)"
                " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (email) DO NOTHING",
                values,
            )
            if email is not None:
                self.limit_again(execute, email, is_invited=False)
            # Another sign-in with the same e-mail may have been faster.
            rows = execute(_SELECT_ACCOUNTS + "address = ? OR email = ?", (address, email))
        return Account(*rows[0])

    def limit_again(
        self,
        run: Run,
        email: str,
        is_invited: bool,
    ) -> None:
        """Apply the host's limits of a person's former account to the new one.

        With a new invitation of the host, the invitation's number of nodes applies instead.
        """
        for max_nodes, suspended_at in run(
            "DELETE FROM former_limits WHERE email_name = ? RETURNING max_nodes, suspended_at",
            (self._name_of(email),),
        ):
            run(
                "UPDATE accounts SET max_nodes = iif(?, max_nodes, min(max_nodes, ?)),"
                " suspended_at = ? WHERE email = ?",
                (is_invited, max_nodes, suspended_at, email),
            )

    def _name_of(self, email: str) -> bytes:
        if self._seal is None:
            raise Refused(403, "AccountsClosed", "account.passphrase_file is not set at the host")
        return self._seal.name_of(email)

    def key_of(self, account: Account) -> LocalAccount:
        """Return the account's key. Raises SecretError if it can't be decrypted."""
        if account.is_operator:
            return self._operator_key
        rows = self.database.execute(
            "SELECT sealed_key FROM accounts WHERE id = ? AND sealed_key NOT NULL", (account.id,)
        )
        if self._seal is None or not rows:
            raise SecretError(
                f"account {account.address}: no key to decrypt; expected account.passphrase_file,"
                " and an account that is not deleted"
            )
        key: LocalAccount = EthAccount.from_key(self._seal.open(rows[0][0], account.address))
        return key

    def set_suspended(
        self,
        account_id: int,
        is_suspended: bool,
    ) -> None:
        """Suspend an account, or end its suspension. The operator's can't be suspended."""
        self.database.execute(
            "UPDATE accounts SET suspended_at = ? WHERE id = ? AND id != ?",
            (time.time() if is_suspended else None, account_id, OPERATOR_ID),
        )

    def set_max_nodes(
        self,
        account_id: int,
        max_nodes: int,
    ) -> None:
        self.database.execute(
            "UPDATE accounts SET max_nodes = ? WHERE id = ?", (max_nodes, account_id)
        )

    def delete(
        self,
        account: Account,
        usual_nodes: int = 0,
    ) -> None:
        """Delete a person's account with its key, nodes, sessions and passkeys.

        Its address stays in the database without the person, so that its row on the chain has a
        name. A suspension, and a limit below the usual number of nodes, stay too, under a keyed
        hash of the e-mail address. The caller ensures that no transaction is pending.
        """
        with self.database.transaction() as run:
            account = self.by_id(account.id, run)
            is_limited = account.suspended_at is not None or account.max_nodes < usual_nodes
            if account.email is not None and is_limited:
                run(
                    "INSERT OR REPLACE INTO former_limits VALUES (?, ?, ?)",
                    (self._name_of(account.email), account.max_nodes, account.suspended_at),
                )
            run(
                "UPDATE accounts SET sealed_key = NULL, email = NULL, deleted_at = ? WHERE id = ?",
                (time.time(), account.id),
            )
            for table in _OF_AN_ACCOUNT:
                run(f"DELETE FROM {table} WHERE account_id = ?", (account.id,))  # noqa: S608
            run("DELETE FROM releases WHERE from_id = ? OR to_id = ?", (account.id, account.id))
        # The write-ahead log still has the key and the e-mail address.
        self.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def deleted_addresses(self) -> list[str]:
        rows = self.database.execute("SELECT address FROM accounts WHERE deleted_at NOT NULL")
        return [address for (address,) in rows]

    def _keep_operator(
        self,
        address: str,
        org_id: str,
    ) -> None:
        with self.database.transaction() as run:
            run(
                "INSERT INTO accounts (id, org_id, address, max_nodes, created_at) VALUES"
                " (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET org_id = excluded.org_id,"
                " address = excluded.address",
                (OPERATOR_ID, org_id, address, 2**31, time.time()),
            )

    def _find(
        self,
        condition: str,
        value: object,
        run: Run | None = None,
    ) -> Account | None:
        execute = run or self.database.execute
        rows = execute(f"{_SELECT_ACCOUNTS}{condition} AND deleted_at IS NULL", (value,))
        return Account(*rows[0]) if rows else None

    # ---- nodes and their tokens

    def nodes_of(self, account: Account) -> list[Node]:
        rows = self.database.execute(
            _SELECT_NODES + "account_id = ? ORDER BY linked_at", (account.id,)
        )
        return [Node(*row) for row in rows]

    def node(self, peer_id: str) -> Node | None:
        rows = self.database.execute(_SELECT_NODES + "peer_id = ?", (peer_id,))
        return Node(*rows[0]) if rows else None

    def numbers_of_nodes(self) -> dict[int, int]:
        """Return the number of nodes of each account that has any, by the account's id."""
        return dict(
            self.database.execute("SELECT account_id, count(*) FROM nodes GROUP BY account_id")
        )

    def link(
        self,
        account: Account,
        peer_id: str,
        name: str = "",
    ) -> str:
        """Link the node to the account, and return its token; an earlier token becomes invalid.

        Raises Refused if the node is linked to another account, if the account has as many nodes as
        it may, or if it is suspended.
        """
        with self.database.transaction() as run:
            return self.link_in(run, account, peer_id, name)

    def link_in(
        self,
        run: Run,
        account: Account,
        peer_id: str,
        name: str = "",
    ) -> str:
        """Link the node as `link` does, in the transaction of `run`."""
        problem = _problem(run, account, peer_id)
        if problem is not None:
            raise problem
        token = f"hwn_{secrets.token_urlsafe(32)}"
        expires_at: float | None = time.time() + TOKEN_SECONDS
        token_hash: bytes | None = digest(token)
        if account.is_operator and not _is_ended(run, peer_id):
            token = self._operator_tokens.issue(peer_id)
            token_hash = expires_at = None
        run(
            "INSERT INTO nodes (peer_id, account_id, name, linked_at, token_hash,"
            " token_expires_at) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (peer_id) DO UPDATE SET"
            " token_hash = excluded.token_hash, token_expires_at = excluded.token_expires_at,"
            " revoked_at = NULL",
            (
                peer_id,
                account.id,
                name or identity.animal_name(peer_id),
                time.time(),
                token_hash,
                expires_at,
            ),
        )
        return token

    def find_problem(
        self,
        account: Account,
        peer_id: str,
    ) -> Refused | None:
        """Return why the account can't link the node, with what to do; None: it can."""
        return _problem(self.database.execute, account, peer_id)

    def problem_of_new(self, account: Account) -> Refused | None:
        """Return why the account can't have one more node; None: it can."""
        return _problem_of(self.database.execute, account)

    def unlink(
        self,
        account: Account,
        peer_id: str,
    ) -> None:
        """Remove the node from the account, so that another account can link it."""
        with self.database.transaction() as run:
            _change(run, account, peer_id, "DELETE FROM nodes")
            _end_token(run, account, peer_id)

    def revoke(
        self,
        account: Account,
        peer_id: str,
    ) -> None:
        """Make the node's token invalid; it stays linked, and can sign in again."""
        with self.database.transaction() as run:
            _change(run, account, peer_id, _REVOKE, time.time())
            _end_token(run, account, peer_id)

    def rename(
        self,
        account: Account,
        peer_id: str,
        name: str,
    ) -> None:
        _change(self.database.execute, account, peer_id, "UPDATE nodes SET name = ?", name)

    def move(
        self,
        peer_id: str,
        holder: Account,
        account: Account,
    ) -> None:
        """Link the holder's node to `account`; it has no token until it signs in there.

        Raises Refused if `account` has as many nodes as it may or is suspended, or if the node is
        not the holder's.
        """
        with self.database.transaction() as run:
            if problem := _problem_of(run, account):
                raise problem
            _end_token(run, holder, peer_id)
            _change(run, holder, peer_id, _REVOKE, time.time())
            _change(run, holder, peer_id, "UPDATE nodes SET account_id = ?", account.id)

    def caller(self, token: str) -> tuple[str, Account] | None:
        """Return the peer and account of a token; None if it is invalid or expired.

        An HMAC of the operator's is valid until the node is revoked, unlinked or moved.
        """
        peer_id = self._operator_tokens.peer_of(token)
        if peer_id is not None:
            return (peer_id, self.operator) if self.has_first_token(peer_id) else None
        rows = self.database.execute(_SELECT_NODES + "token_hash = ?", (digest(token),))
        node = Node(*rows[0]) if rows else None
        if node is None or not node.has_access:
            return None
        return node.peer_id, self.by_id(node.account_id)

    def has_first_token(self, peer_id: str) -> bool:
        """Return whether the node's token is the operator's HMAC; for unknown nodes it is."""
        node = self.node(peer_id)
        is_operators = node is None or (node.account_id == OPERATOR_ID and node.revoked_at is None)
        return is_operators and not _is_ended(self.database.execute, peer_id)

    def note_use(
        self,
        account: Account,
        peer_id: str,
    ) -> None:
        """Record that the node's token was used now, which also extends its validity.

        A node of the operator's from before this database gets its row here. A node that was
        unlinked, or moved to another account, since the call arrived is not linked again.
        """
        now = time.time()
        node = self.node(peer_id)
        if node is None:
            if not account.is_operator or _is_ended(self.database.execute, peer_id):
                return
            self.link(account, peer_id)
        elif node.seen_at is not None and now - node.seen_at < _TOUCH_SECONDS:
            return
        self._history.execute(
            "UPDATE nodes SET seen_at = ?, token_expires_at = iif(token_hash IS NULL, NULL, ?)"
            " WHERE peer_id = ? AND account_id = ?",
            (now, now + TOKEN_SECONDS, peer_id, account.id),
        )

    # ---- transactions

    def note_sent(
        self,
        account: Account,
        peer_id: str,
        call: str,
        tx_hash: str,
        round: int | None,
    ) -> None:
        """Store a transaction for the account's page; `tx_hash`: its first hash."""
        with self._history.transaction() as run:
            rows = run(
                "INSERT INTO transactions (account_id, peer_id, call, hash, sent_at) SELECT"
                " ?, ?, ?, ?, ? WHERE NOT EXISTS (SELECT 1 FROM transactions WHERE hash = ?)"
                " RETURNING id",
                (account.id, peer_id, call, tx_hash, time.time(), tx_hash),
            )
            if rows and rows[0][0] % 100 == 0:
                run(
                    "DELETE FROM transactions WHERE account_id = ? AND id <= (SELECT id FROM"
                    " transactions WHERE account_id = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
                    (account.id, account.id, _KEPT_TRANSACTIONS),
                )
            if round is not None:
                run(
                    "UPDATE nodes SET last_round = max(?, ifnull(last_round, 0)) WHERE peer_id = ?",
                    (round, peer_id),
                )

    def note_mined(self, transaction: Transaction) -> None:
        """Store the final state of a transaction, and the hash with which it was mined."""
        self._history.execute(
            "UPDATE transactions SET state = ?, hash = ? WHERE id = ?",
            (transaction.state, transaction.hash, transaction.id),
        )

    def transactions(
        self,
        account: Account,
        most: int,
        offset: int = 0,
    ) -> Sequence[Transaction]:
        """Return at most `most` transactions of the account, newest first."""
        rows = self.database.execute(
            "SELECT id, peer_id, call, hash, sent_at, state FROM transactions WHERE account_id = ?"
            " ORDER BY id DESC LIMIT ? OFFSET ?",
            (account.id, most, offset),
        )
        return [Transaction(*row) for row in rows]


def digest(secret: str) -> bytes:
    """Return the hash that is stored in the place of a random secret."""
    return hashlib.sha256(secret.encode()).digest()


def _problem(
    run: Run,
    account: Account,
    peer_id: str,
) -> Refused | None:
    """Return why the account can't link the node."""
    rows = run("SELECT account_id FROM nodes WHERE peer_id = ?", (peer_id,))
    if rows and rows[0][0] != account.id and account.suspended_at is None:
        holders = run("SELECT address FROM accounts WHERE id = ?", rows[0])
        return peer_taken(peer_id, holders[0][0], account.address)
    return _problem_of(run, account, is_new=not rows)


def _problem_of(
    run: Run,
    account: Account,
    is_new: bool = True,
) -> Refused | None:
    """Return why the account can't have a (new) node."""
    if account.suspended_at is not None:
        return _suspended(account)
    ((count,),) = run("SELECT count(*) FROM nodes WHERE account_id = ?", (account.id,))
    if is_new and count >= account.max_nodes:
        return Refused(
            403,
            "TooManyNodes",
            f"account {account.address} has {count} nodes, as many as it may; unlink one, or ask"
            " the host for more",
        )
    return None


def _change(
    run: Run,
    account: Account,
    peer_id: str,
    statement: str,
    *values: object,
) -> None:
    """Run a statement for one node of the account. Raises Refused if it has no such node."""
    changed = run(
        f"{statement} WHERE peer_id = ? AND account_id = ? RETURNING 1",
        (*values, peer_id, account.id),
    )
    if not changed:
        raise node_unknown()


def _is_ended(run: Run, peer_id: str) -> bool:
    """Return whether the peer's HMAC was revoked; it would be the same if issued again."""
    return bool(run("SELECT 1 FROM ended_tokens WHERE peer_id = ?", (peer_id,)))


def _end_token(
    run: Run,
    account: Account,
    peer_id: str,
) -> None:
    """Revoke the peer's HMAC for good: a later token is random, like those of people's nodes."""
    if account.is_operator:
        run("INSERT OR IGNORE INTO ended_tokens VALUES (?)", (peer_id,))


def node_unknown() -> Refused:
    return Refused(404, "NodeUnknown", "the account has no such node")


def require_active(account: Account) -> None:
    if account.suspended_at is not None:
        raise _suspended(account)


def _suspended(account: Account) -> Refused:
    return Refused(
        403, "AccountSuspended", f"the host suspended account {account.address}; ask the host"
    )


def peer_taken(
    peer_id: str,
    holder: str,
    ours: str,
) -> Refused:
    """Return the refusal for a node that belongs to another account; it names both accounts."""
    return Refused(
        409,
        "PeerOfAnotherAccount",
        f"node {peer_id} belongs to account {holder}, and this is account {ours}; its owner"
        f" may release it to {ours} at the page, or unlink it and have you run `hivewright login"
        " URL --move`; or use a new key",
    )
