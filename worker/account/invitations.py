"""Invitations: secrets with which a person may sign up, or enrol a number of nodes."""

import secrets
import time
from dataclasses import dataclass

from worker.account.accounts import Account, Accounts, Run, digest, require_active
from worker.account.releases import release_all
from worker.account.request_bodies import Refused
from worker.chain.database import Database

PREFIX = "hwi_"
_SELECT = "SELECT hash, account_id, max_nodes, used, expires_at FROM invitations WHERE"
_OF_HOST = "(account_id IS NULL OR account_id IN (SELECT id FROM nobodys))"
"""Invitations for an account that no person has yet."""


@dataclass(frozen=True, slots=True)
class Invitation:
    """An invitation of the host (`account_id` None until it is used), or of an account."""

    hash: bytes
    account_id: int | None
    max_nodes: int
    used: int
    expires_at: float


def create(
    database: Database,
    max_nodes: int,
    expires_at: float,
    account: Account | None = None,
) -> str:
    """Return the secret of a new invitation.

    With `account`, it enrols up to `max_nodes` nodes for that account. Without, its first user gets
    an account that may have `max_nodes` nodes.
    """
    secret = PREFIX + secrets.token_urlsafe(24)
    database.execute(
        "INSERT INTO invitations (hash, account_id, max_nodes, created_at, expires_at) VALUES"
        " (?, ?, ?, ?, ?)",
        (digest(secret), account and account.id, max_nodes, time.time(), expires_at),
    )
    return secret


class Invitations:
    """The invitations in the database. Only hashes of their secrets are stored."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._database = accounts.database

    def of(self, account: Account) -> list[Invitation]:
        """Return the valid invitations of the account."""
        return self._select("account_id = ? AND expires_at > ?", account.id, time.time())

    def of_host(self) -> list[Invitation]:
        """Return the host's invitations that can still be used, and that no person has used."""
        return self._select(f"{_OF_HOST} AND (expires_at > ? OR account_id NOT NULL)", time.time())

    def withdraw(
        self,
        account: Account,
        hash: bytes,
    ) -> None:
        self._database.execute(
            "DELETE FROM invitations WHERE account_id = ? AND hash = ?", (account.id, hash)
        )

    def withdraw_of_host(self, hash: bytes) -> None:
        """End an invitation of the host; nodes that it enrolled stay linked."""
        self._database.execute(
            f"DELETE FROM invitations WHERE hash = ? AND {_OF_HOST}",  # noqa: S608
            (hash,),
        )

    def find(self, hash: bytes) -> Invitation:
        """Return an invitation that a person may use (and, until its last day, a node).

        Raises Refused.
        """
        return _find_for_person(self._database.execute, hash)

    def enrol(
        self,
        secret: str,
        peer_id: str,
    ) -> str:
        """Link a node by an invitation, and return its token.

        Raises Refused if the invitation is not valid or used up, or the account can't have the
        node.
        """
        with self._database.transaction() as run:
            invitation = _find(run, digest(secret))
            account = self._account_of(run, invitation)
            if not run(
                "SELECT 1 FROM nodes WHERE peer_id = ? AND account_id = ?", (peer_id, account.id)
            ):
                _use(run, invitation)
            return self._accounts.link_in(run, account, peer_id)

    def accept(
        self,
        hash: bytes,
        email: str,
    ) -> Account:
        """Return the account of a person with this verified e-mail, invited by the host.

        It is the invitation's account, unless the person has one already. That one may then have
        the invitation's number of nodes in addition, and nodes that have enrolled are released to
        it. Raises Refused if the invitation is invalid, or another person has used it.
        """
        with self._database.transaction() as run:
            invitation = _find_for_person(run, hash)
            account = self._accounts.by_email(email, run)
            if account is not None:
                self._join(run, invitation, account)
                return self._accounts.by_id(account.id, run)
            account = self._account_of(run, invitation)
            if not run(
                "UPDATE accounts SET email = ? WHERE id IN (SELECT id FROM nobodys WHERE id = ?)"
                " RETURNING 1",
                (email, account.id),
            ):
                raise Refused(
                    403,
                    "InvitationInvalid",
                    "somebody else has used this invitation; ask for another",
                )
            self._accounts.limit_again(run, email, is_invited=True)
            return self._accounts.by_id(account.id, run)

    def _join(
        self,
        run: Run,
        invitation: Invitation,
        account: Account,
    ) -> None:
        """Give the invitation and its nodes to the account, unless another person has used it."""
        if invitation.account_id is not None:
            holder = self._accounts.by_id(invitation.account_id, run)
            if not holder.is_nobodys:
                return
            require_active(holder)
            release_all(run, holder.id, account.id)
        run("UPDATE invitations SET account_id = ? WHERE hash = ?", (account.id, invitation.hash))
        run(
            "UPDATE accounts SET max_nodes = max_nodes + ? WHERE id = ?",
            (invitation.max_nodes, account.id),
        )

    def _select(self, condition: str, *values: object) -> list[Invitation]:
        rows = self._database.execute(f"{_SELECT} {condition} ORDER BY created_at", values)
        return [Invitation(*row) for row in rows]

    def _account_of(
        self,
        run: Run,
        invitation: Invitation,
    ) -> Account:
        """Return the invitation's account, which its first use creates."""
        if invitation.account_id is not None:
            return self._accounts.by_id(invitation.account_id, run)
        account = self._accounts.create(None, invitation.max_nodes, run)
        run(
            "UPDATE invitations SET account_id = ? WHERE hash = ?",
            (account.id, invitation.hash),
        )
        return account


def _find(
    run: Run,
    hash: bytes,
    otherwise: str = "FALSE",
) -> Invitation:
    """Return a valid invitation, or one for which `otherwise` is true. Raises Refused."""
    rows = run(f"{_SELECT} hash = ? AND (expires_at > ? OR {otherwise})", (hash, time.time()))
    if not rows:
        raise Refused(
            403,
            "InvitationInvalid",
            "this invitation is unknown, used up or expired; ask for a new one",
        )
    return Invitation(*rows[0])


def _find_for_person(run: Run, hash: bytes) -> Invitation:
    """Return a valid invitation, or one with which nodes have enrolled but no person signed in.

    The person may sign in after its last day, because nobody else can sign in to that account.
    """
    return _find(run, hash, "account_id IN (SELECT id FROM nobodys)")


def _use(run: Run, invitation: Invitation) -> None:
    if not run(
        "UPDATE invitations SET used = used + 1 WHERE hash = ? AND used < max_nodes RETURNING 1",
        (invitation.hash,),
    ):
        raise Refused(
            403,
            "InvitationInvalid",
            f"the invitation was for {invitation.max_nodes} nodes, which have used it; ask for"
            " another",
        )
