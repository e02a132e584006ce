"""The pages of a person's account: nodes, transactions, invitations, settings."""

import asyncio
import json
import logging
import secrets
import time
from collections import Counter
from dataclasses import dataclass

from aiohttp import web
from eth_account import Account as EthAccount

from worker.account import invitations
from worker.account.accounts import MAX_NAME, Account, Node
from worker.account.releases import releases_by, releases_to
from worker.account.request_bodies import Refused
from worker.account.site import Form, Site, Visitor, see, text_of
from worker.account.transaction_states import Row, rows_of
from worker.chain.coordinator import submitted
from worker.chain.quotas import Quota
from worker.errors import ChainError
from worker.swarm import identity

log = logging.getLogger(__name__)

_PAGE_ROWS = 50
_MAX_INVITATIONS = 50
"""Largest number of valid invitations of an account at a time."""
_MIN_PASSWORD = 10
_EXPORTS_PER_SECOND, _EXPORTS_BURST = 1 / 600, 5.0
"""Of one account."""
DAY_SECONDS = 24 * 3600.0
MAX_INVITATION_DAYS = 90


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node, with the values of its row.

    `confirmed`: rewards on the chain; None: the chain does not answer. `pending`: rewards in
    pending transactions. `num_pending`: number of all pending transactions.
    """

    node: Node
    animal_name: str
    state: str
    confirmed: float | None
    pending: float
    num_pending: int


class AccountPages:
    """`/`, `/transactions`, `/settings` and their forms."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._exports = Quota(_EXPORTS_PER_SECOND, _EXPORTS_BURST)
        self._exporting = asyncio.Semaphore(1)
        """Limit of exports, because each takes a second and 256 MiB."""

    def add_to(self, application: web.Application) -> None:
        site, router = self._site, application.router
        router.add_get("/", site.signed_in(self.nodes))
        router.add_get("/transactions", site.signed_in(self.transactions))
        router.add_get("/settings", site.signed_in(self.settings))
        for path, handle in (
            ("/nodes/rename", self.rename),
            ("/nodes/revoke", self.revoke),
            ("/nodes/unlink", self.unlink),
            ("/invitations/create", self.invite),
            ("/invitations/withdraw", self.withdraw),
            ("/settings/export", self.export),
            ("/settings/delete", self.delete),
        ):
            router.add_post(path, site.signed_in(handle, is_post=True))

    # ---- reading

    async def nodes(
        self,
        request: web.Request,
        visitor: Visitor,
    ) -> web.Response:
        return await self._nodes_page(request, visitor, "")

    async def _nodes_page(
        self, request: web.Request, visitor: Visitor, invitation: str
    ) -> web.Response:
        """Return the page of nodes; `invitation`: the secret of a new invitation to show."""
        site, account = self._site, visitor.account
        rows, round, problem = await site.in_thread(self._rows, account)
        return site.page(
            request,
            "nodes.html",
            visitor,
            rows=rows,
            round=round,
            problem=problem,
            is_fresh=visitor.session.is_fresh,
            releases=await site.in_thread(releases_by, site.accounts, account),
            offers=await site.in_thread(releases_to, site.accounts, account),
            invitation=invitation,
            invitations=await site.in_thread(site.invitations.of, account),
        )

    async def transactions(
        self,
        request: web.Request,
        visitor: Visitor,
    ) -> web.Response:
        text = request.query.get("page", "0")
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 0
        rows, has_more = await self._site.in_thread(
            self._transactions, visitor.account, number * _PAGE_ROWS
        )
        names = {
            node.peer_id: node.name
            for node in await self._site.in_thread(self._site.accounts.nodes_of, visitor.account)
        }
        return self._site.page(
            request,
            "transactions.html",
            visitor,
            rows=rows,
            names=names,
            number=number,
            has_more=has_more,
        )

    async def settings(
        self,
        request: web.Request,
        visitor: Visitor,
    ) -> web.Response:
        passkeys = await self._site.in_thread(
            self._site.accounts.database.execute,
            "SELECT credential_id, added_at FROM passkeys WHERE account_id = ? ORDER BY added_at",
            (visitor.account.id,),
        )
        return self._site.page(
            request,
            "settings.html",
            visitor,
            is_fresh=visitor.session.is_fresh,
            passkeys=[(bytes(key).hex(), added_at) for key, added_at in passkeys],
            min_password=_MIN_PASSWORD,
        )

    def _rows(self, account: Account) -> tuple[list[NodeRow], int | None, str]:
        """Return the nodes, the round, and why the chain can't be read ("": it can)."""
        site = self._site
        nodes = site.accounts.nodes_of(account)
        round: int | None = None
        rewards: list[int] | None = None
        problem = ""
        try:
            round = site.coordinator.current_round()
            rewards = site.coordinator.total_rewards([node.peer_id for node in nodes])
        except ChainError as error:
            log.debug("page without chain error=%s", error)
            problem = "The chain does not answer right now: rounds and rewards are missing."
        numbers, sums = self._pending(account)
        rows = [
            NodeRow(
                node,
                identity.animal_name(node.peer_id),
                _state(node, round),
                None if rewards is None else rewards[place] / 1000,
                sums[node.peer_id] / 1000,
                numbers[node.peer_id],
            )
            for place, node in enumerate(nodes)
        ]
        return rows, round, problem

    def _pending(self, account: Account) -> tuple[Counter[str], Counter[str]]:
        """Return number and summed rewards of each peer's calls that the chain has not mined."""
        numbers: Counter[str] = Counter()
        sums: Counter[str] = Counter()
        waiting = self._site.queues.pending(account)
        if not waiting:
            return numbers, sums
        for each in self._site.accounts.transactions(account, 1000):
            if each.hash in waiting:
                numbers[each.peer_id] += 1
        for entry in waiting.values():
            submission = submitted(entry.call)
            if submission is not None:
                peer_id, reward = submission
                sums[peer_id] += reward
        return numbers, sums

    def _transactions(
        self,
        account: Account,
        offset: int,
    ) -> tuple[list[Row], bool]:
        """Return a page's transactions from `offset` on, and whether there are more."""
        site = self._site
        found = site.accounts.transactions(account, _PAGE_ROWS + 1, offset)
        rows = rows_of(found[:_PAGE_ROWS], account, site.accounts, site.queues, site.coordinator)
        return rows, len(found) > _PAGE_ROWS

    # ---- nodes

    async def rename(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        name = text_of(form, "name", MAX_NAME)
        if not name:
            raise Refused(400, "NameMissing", f"expected a name of 1 to {MAX_NAME} characters")
        await self._site.in_thread(
            self._site.accounts.rename, visitor.account, text_of(form, "peer"), name
        )
        return see("/")

    async def revoke(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        peer_id = text_of(form, "peer")
        await self._site.in_thread(self._site.accounts.revoke, visitor.account, peer_id)
        log.info("token revoked peer_id=%s account=%s", peer_id, visitor.account.address)
        return see("/")

    async def unlink(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        peer_id = text_of(form, "peer")
        await self._site.in_thread(self._site.accounts.unlink, visitor.account, peer_id)
        log.info("node unlinked peer_id=%s account=%s", peer_id, visitor.account.address)
        return see("/")

    # ---- invitations of the account

    async def invite(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        """Show the secret of a new invitation, once."""
        num_nodes = number_of(form, "nodes", visitor.account.max_nodes)
        days = number_of(form, "days", MAX_INVITATION_DAYS)
        valid = await self._site.in_thread(self._site.invitations.of, visitor.account)
        if len(valid) >= _MAX_INVITATIONS:
            raise Refused(
                400,
                "TooManyInvitations",
                f"this account has {_MAX_INVITATIONS} invitations; withdraw one first",
            )
        secret = await self._site.in_thread(
            invitations.create,
            self._site.accounts.database,
            num_nodes,
            time.time() + days * DAY_SECONDS,
            visitor.account,
        )
        return await self._nodes_page(request, visitor, secret)

    async def withdraw(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        await self._site.in_thread(
            self._site.invitations.withdraw, visitor.account, bytes_of(form, "invitation")
        )
        return see("/")

    # ---- the key and the account

    async def export(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        """Answer with the account's key as an encrypted keystore file."""
        require_fresh(visitor)
        password = str(form.get("password", ""))
        if not _MIN_PASSWORD <= len(password) <= 200:
            raise Refused(
                400, "PasswordShort", f"expected a password of {_MIN_PASSWORD} characters or more"
            )
        if not self._exports.take(visitor.account.address):
            raise Refused(429, "TooManyExports", "the key was exported often; wait some minutes")
        async with self._exporting:
            keystore = await self._site.in_thread(self._keystore, visitor.account, password)
        log.info("key exported account=%s", visitor.account.address)
        return web.Response(
            body=keystore,
            content_type="application/json",
            headers={
                "Content-Disposition": f'attachment; filename="{visitor.account.address}.json"'
            },
        )

    def _keystore(
        self,
        account: Account,
        password: str,
    ) -> bytes:
        key = self._site.accounts.key_of(account)
        return json.dumps(EthAccount.encrypt(key.key, password)).encode()

    async def delete(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        account = visitor.account
        require_fresh(visitor)
        if account.is_operator:
            raise Refused(400, "OperatorStays", "the operator's account can't be deleted")
        typed = text_of(form, "address")
        if not secrets.compare_digest(typed.lower().encode(), account.address.lower().encode()):
            raise Refused(400, "NotConfirmed", f"expected {account.address} to confirm")
        await self._site.in_thread(self._delete, account)
        log.info("account deleted account=%s", account.address)
        return self._site.sign_out(request)

    def _delete(self, account: Account) -> None:
        site = self._site
        with site.queues.ended(account) as is_idle:
            if not is_idle:
                raise Refused(
                    409,
                    "TransactionsPending",
                    "transactions of this account are not on the chain yet; try again in a minute",
                )
            site.accounts.delete(account, site.settings.max_nodes)
        site.queues.remove_journals([account.address])


def bytes_of(form: Form, name: str) -> bytes:
    """Return a hexadecimal field. Raises Refused."""
    try:
        return bytes.fromhex(text_of(form, name, 2048))
    except ValueError:
        raise Refused(400, "FieldInvalid", f"{name}: expected hexadecimal digits") from None


def number_of(
    form: Form,
    name: str,
    most: int,
) -> int:
    text = text_of(form, name, 9)
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= most:
        raise Refused(400, "FieldInvalid", f"{name}: expected a number from 1 to {most}")
    return int(text)


def require_fresh(visitor: Visitor) -> None:
    if not visitor.session.is_fresh:
        raise Refused(
            403, "SignInAgain", "this needs a sign-in within the last five minutes; sign in again"
        )


def _state(node: Node, round: int | None) -> str:
    if node.revoked_at is not None:
        return "revoked"
    if not node.has_access:
        return "expired"
    if node.last_round is None:
        return "linked"
    if round is None or node.last_round >= round - 2:
        return "training"
    return "silent"
