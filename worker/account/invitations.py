"""Invitations: secrets with which somebody may sign up, or enrol a number of nodes."""

import secrets
import time
from dataclasses import dataclass

from worker.account.accounts import Account, Accounts, digest
from worker.account.request_bodies import Refused
from worker.chain.database import Database

PREFIX = "hwi_"


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

    With `account`, it enrols that many more nodes for it; without, the first one who uses it gets
    an account that may have as many nodes.
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
        rows = self._database.execute(
            "SELECT hash, account_id, max_nodes, used, expires_at FROM invitations WHERE"
            " account_id = ? AND expires_at > ? ORDER BY created_at",
            (account.id, time.time()),
        )
        return [Invitation(*row) for row in rows]

    def withdraw(
        self,
        account: Account,
        hash: bytes,
    ) -> None:
        self._database.execute(
            "DELETE FROM invitations WHERE account_id = ? AND hash = ?", (account.id, hash)
        )

    def find(self, hash: bytes) -> Invitation:
        """Return a valid invitation. Raises Refused if it is unknown, used up or expired."""
        rows = self._database.execute(
            "SELECT hash, account_id, max_nodes, used, expires_at FROM invitations WHERE hash = ?"
            " AND expires_at > ?",
            (hash, time.time()),
        )
        if not rows:
            raise Refused(
                403,
                "InvitationInvalid",
                "this invitation is unknown, used up or expired; ask for a new one",
            )
        return Invitation(*rows[0])

    def enrol(
        self,
        secret: str,
        peer_id: str,
    ) -> str:
        """Link a node by an invitation, and return its token.

        Raises Refused if the invitation is not valid or used up, or the account can't have the
        node.
        """
        invitation = self.find(digest(secret))
        account = self._account_of(invitation)
        node = self._accounts.node(peer_id)
        is_new = node is None or node.account_id != account.id
        if is_new:
            self._use(invitation)
        try:
            return self._accounts.link(account, peer_id)
        except Refused:
            if is_new:
                self._give_back(invitation)
            raise

    def accept(
        self,
        hash: bytes,
        email: str,
    ) -> Account:
        """Return the account of a person with this verified e-mail, invited by the host.

        A person with an account keeps it. Raises Refused if the invitation is not valid, or is
        another person's.
        """
        invitation = self.find(hash)
        account = self._accounts.by_email(email)
        if account is not None:
            return account
        account = self._account_of(invitation)
        if not self._database.execute(
            "UPDATE accounts SET email = ? WHERE id = ? AND email IS NULL AND id != 1 RETURNING 1",
            (email, account.id),
        ):
            raise Refused(
                403, "InvitationInvalid", "somebody else has used this invitation; ask for another"
            )
        return self._accounts.by_id(account.id)

    def _account_of(self, invitation: Invitation) -> Account:
        """Return the invitation's account, which its first use creates."""
        if invitation.account_id is not None:
            return self._accounts.by_id(invitation.account_id)
        with self._database.transaction() as run:
            ((account_id,),) = run(
                "SELECT account_id FROM invitations WHERE hash = ?", (invitation.hash,)
            )
            if account_id is None:
                account_id = self._accounts.create(None, invitation.max_nodes, run).id
                run(
                    "UPDATE invitations SET account_id = ? WHERE hash = ?",
                    (account_id, invitation.hash),
                )
        return self._accounts.by_id(account_id)

    def _use(self, invitation: Invitation) -> None:
        if not self._database.execute(
            "UPDATE invitations SET used = used + 1 WHERE hash = ? AND used < max_nodes RETURNING"
            " 1",
            (invitation.hash,),
        ):
            raise Refused(
                403,
                "InvitationInvalid",
                f"the invitation was for {invitation.max_nodes} nodes, which have used it; ask for"
                " another",
            )

    def _give_back(self, invitation: Invitation) -> None:
        self._database.execute(
            "UPDATE invitations SET used = used - 1 WHERE hash = ?", (invitation.hash,)
        )
