"""The host's page: accounts with their nodes, quotas and suspensions, and invitations."""

import logging
import time
from dataclasses import dataclass

from aiohttp import web

from worker.account import invitations
from worker.account.account_pages import (
    DAY_SECONDS,
    MAX_INVITATION_DAYS,
    bytes_of,
    number_of,
)
from worker.account.accounts import Account
from worker.account.request_bodies import Refused
from worker.account.site import Form, Site, Visitor, see, text_of

log = logging.getLogger(__name__)

_MAX_NODES = 10_000


@dataclass(frozen=True, slots=True)
class AccountRow:
    """An account, with the values of its row."""

    account: Account
    num_nodes: int


class HostPages:
    """`/host` and its forms, for people who sign in to the operator's account."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def add_to(self, application: web.Application) -> None:
        site, router = self._site, application.router
        router.add_get("/host", site.signed_in(self.show))
        for path, handle in (
            ("/host/quota", self.quota),
            ("/host/suspend", self.suspend),
            ("/host/invite", self.invite),
            ("/host/withdraw", self.withdraw),
        ):
            router.add_post(path, site.signed_in(handle, is_post=True))

    async def show(
        self,
        request: web.Request,
        visitor: Visitor,
    ) -> web.Response:
        _require_host(visitor)
        return await self._page(request, visitor, "")

    async def quota(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        _require_host(visitor)
        account = await self._account(form)
        num_nodes = number_of(form, "nodes", _MAX_NODES)
        await self._site.in_thread(self._site.accounts.set_max_nodes, account.id, num_nodes)
        return see("/host")

    async def suspend(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        """Suspend an account, or end its suspension; its sessions stay, its nodes stop sending."""
        _require_host(visitor)
        account = await self._account(form)
        is_suspended = text_of(form, "suspend") == "yes"
        await self._site.in_thread(self._site.accounts.set_suspended, account.id, is_suspended)
        log.info("account suspended=%s account=%s", is_suspended, account.address)
        return see("/host")

    async def invite(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        _require_host(visitor)
        num_nodes = number_of(form, "nodes", _MAX_NODES)
        days = number_of(form, "days", MAX_INVITATION_DAYS)
        secret = await self._site.in_thread(
            invitations.create,
            self._site.accounts.database,
            num_nodes,
            time.time() + days * DAY_SECONDS,
        )
        return await self._page(request, visitor, secret)

    async def withdraw(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        _require_host(visitor)
        await self._site.in_thread(
            self._site.invitations.withdraw_of_host, bytes_of(form, "invitation")
        )
        return see("/host")

    async def _page(
        self,
        request: web.Request,
        visitor: Visitor,
        invitation: str,
    ) -> web.Response:
        rows = await self._site.in_thread(self._rows)
        return self._site.page(
            request,
            "host.html",
            visitor,
            rows=rows,
            invitations=await self._site.in_thread(self._site.invitations.of_host),
            invitation=invitation,
            link=f"{self._site.address(request)}/sign-in#invitation={invitation}",
        )

    def _rows(self) -> list[AccountRow]:
        numbers = self._site.accounts.numbers_of_nodes()
        return [
            AccountRow(account, numbers.get(account.id, 0)) for account in self._site.accounts.all()
        ]

    async def _account(self, form: Form) -> Account:
        org_id = text_of(form, "account")
        account = await self._site.in_thread(self._site.accounts.by_org, org_id)
        if account is None or account.is_operator:
            raise Refused(404, "AccountUnknown", "no such account of a person")
        return account


def _require_host(visitor: Visitor) -> None:
    if not visitor.account.is_operator:
        raise Refused(404, "PageUnknown", "there is no such page")
