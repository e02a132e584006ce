"""The dashboard (`hivewright dashboard`): a read-only page about the swarm, also as JSON.

Requests cost the chain nothing: one thread reads it every `chain.poll_seconds`. The dashboard
starts and keeps running without a chain; the page then says so, next to the last known state.
"""

import asyncio
import json
import logging

from aiohttp import web

from worker.dashboard.fleet_view import FleetView
from worker.dashboard.market_page import MarketPage
from worker.dashboard.owner import Owner
from worker.dashboard.pages import HEADERS, Pages, pages_of
from worker.dashboard.reader import Reader
from worker.dashboard.store import Store
from worker.dashboard.views import Views
from worker.errors import SettingsError
from worker.runtime import systemd, webservice
from worker.settings import Settings

log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 1024
FLEET_SECONDS = 10.0
"""Time between two looks at the fleet's metrics."""


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; the URL is in `<dashboard.state_dir>/address` when ready.

    Raises ResourceError if the port is in use or the folder can't be used, SettingsError if the
    settings name no chain.
    """
    chain = settings.chain
    if not (chain.rpc_url or chain.deployment_file or chain.account_url):
        raise SettingsError(
            "chain.rpc_url, chain.deployment_file and chain.account_url: all empty; the dashboard"
            " shows what a chain says; set one"
        )
    webservice.run("dashboard", settings.dashboard, lambda: Service(settings))


class Service:
    """The page and its JSON, which is encoded once per poll of the chain, not per request."""

    def __init__(self, settings: Settings) -> None:
        self._poll_seconds = settings.chain.poll_seconds
        self._store = Store(settings.dashboard.state_dir)
        self._reader = Reader(settings, self._store)
        self._content = self._encoded()
        section = settings.dashboard
        file = section.targets_file
        self._fleet = None if file is None else FleetView(file, self._store)
        self._shows_fleet = section.show_fleet
        self._fleet_content = self._encoded_fleet()
        views = Views(settings, self._reader, self._store, self._fleet)
        self._market = MarketPage(settings, self._reader.coordinator)
        pages = pages_of(views, self._market)
        self._pages = Pages(self._reader, views, Owner(section.state_dir), pages)

    def application(self) -> web.Application:
        application = webservice.new_application(_MAX_BODY_BYTES)
        self._pages.add_to(application)
        application.router.add_get("/api/swarm", self.swarm)
        application.router.add_get("/api/fleet", self.fleet)
        application.router.add_get("/api/market", self.market)
        application.on_response_prepare.append(add_headers)
        return application

    def started(self, url: str) -> None:
        log.info("dashboard up url=%s", url)

    async def tend(self) -> None:
        """Poll the chain, the market and the fleet, forever."""
        await asyncio.gather(self._tend_chain(), self._tend_market(), self._tend_fleet())

    async def _tend_market(self) -> None:
        while True:
            await asyncio.to_thread(self._market.look)
            await asyncio.sleep(self._poll_seconds)

    async def _tend_fleet(self) -> None:
        while self._fleet is not None:
            await asyncio.to_thread(self._fleet.look)
            self._fleet_content = await asyncio.to_thread(self._encoded_fleet)
            await asyncio.sleep(FLEET_SECONDS)

    async def _tend_chain(self) -> None:
        while True:
            is_known = await asyncio.to_thread(self._reader.look)
            self._content = await asyncio.to_thread(self._encoded)
            systemd.progress("shows the swarm" if is_known else "no chain")
            await asyncio.sleep(self._poll_seconds)

    async def swarm(self, request: web.Request) -> web.Response:
        return web.Response(body=self._content, content_type="application/json")

    async def fleet(self, request: web.Request) -> web.Response:
        return web.Response(body=self._fleet_content, content_type="application/json")

    async def market(self, request: web.Request) -> web.Response:
        return web.Response(body=self._market.data, content_type="application/json")

    def _encoded_fleet(self) -> bytes:
        """Return the fleet, or null if it is not shown."""
        shown = self._fleet.content() if self._fleet and self._shows_fleet else None
        return json.dumps(shown).encode()

    def _encoded(self) -> bytes:
        return json.dumps(self._reader.content()).encode()


async def add_headers(
    request: web.Request,
    response: web.StreamResponse,
) -> None:
    """Set the security headers of every answer."""
    response.headers.update(HEADERS)
