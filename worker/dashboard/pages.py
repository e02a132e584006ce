"""The dashboard's pages: each is a `Page`, a template, and a function that fills it.

The server renders the pages. They are complete without JavaScript, which only refreshes them and
draws curves. The templates escape untrusted text.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from worker.dashboard.market_page import MarketPage
from worker.dashboard.owner import Owner
from worker.dashboard.reader import Reader
from worker.dashboard.views import Asked, Content, Views
from worker.errors import WorkerError
from worker.market_view import rendering
from worker.runtime import webguard, webpages

_FOLDER = Path(__file__).parent / "page"
HEADERS = {
    # All parts of a page come from this server, and nothing in the shown text may run.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # With no-referrer, browsers would send `Origin: null` with our own form.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Page:
    """A page. `content` returns the values of its template, for a query and a visitor.

    It runs in a thread; its second argument tells whether the visitor is the owner. `title` is the
    page's name in the menu. `is_private`: it is for the owner alone. `in_menu`: False if only
    other pages link to it.
    """

    path: str
    title: str
    template: str
    content: Callable[[Asked, bool], Content]
    is_private: bool = False
    in_menu: bool = True


def pages_of(views: Views, market: MarketPage) -> tuple[Page, ...]:
    """Return the pages in the order of the menu."""
    pages = [
        Page("/", "Swarm", "swarm.html", views.swarm),
        Page("/peers", "Peers", "peers.html", views.peers),
        Page("/peer", "Peer", "peer.html", views.peer, in_menu=False),
        Page("/market", "Market", "market.html", lambda _, __: market.content()),
        Page("/chain", "Chain", "chain.html", views.chain),
        Page("/events", "Events", "events.html", views.events),
    ]
    if views.has_fleet:
        is_private = not views.shows_fleet(is_owner=False)
        pages.insert(3, Page("/fleet", "Fleet", "fleet.html", views.fleet, is_private))
    pages.append(Page("/answers", "Answers", "answers.html", views.answers, is_private=True))
    return tuple(pages)


class Pages:
    """The pages of a dashboard, and the owner's way in."""

    def __init__(self, reader: Reader, views: Views, owner: Owner, pages: tuple[Page, ...]) -> None:
        self._reader = reader
        self._views = views
        self._owner = owner
        self._pages = pages
        self._sign_in = Page("/owner", "Owner", "owner.html", lambda _, __: {}, in_menu=False)
        self._templates = webpages.templates(_FOLDER, rendering.FOLDER)
        rendering.prepare(self._templates)
        self._templates.filters |= {
            "age": _age,
            "clipped": clipped,
            "clock": _clock,
            "decimal": decimal,
            "iso": _iso,
        }

    def add_to(self, application: web.Application) -> None:
        application[webguard.FORMS] = True
        files = ("page.css", "page.js", "uplot/uplot.css", "uplot/uplot.js")
        webpages.add_files(application, _FOLDER, files, {})
        webpages.add_file(application, rendering.STYLE, {})
        for page in self._pages:
            application.router.add_get(page.path, self._handler(page))
        application.router.add_get("/owner", self.owner)
        application.router.add_post("/owner", self.sign_in)
        application.router.add_get("/api/curve", self.curve)

    def _handler(self, page: Page) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            is_owner = self._owner.is_at(request)
            if page.is_private and not is_owner:
                text = "This page is for the owner of the dashboard, who signs in at Owner."
                return await self._message(page, 403, "For the owner", text)
            try:
                content = await asyncio.to_thread(page.content, dict(request.query), is_owner)
            except WorkerError as error:
                return await self._message(page, 503, "This does not work right now", str(error))
            return await self._page(page, is_owner, content)

        return answer

    async def _message(self, page: Page, status: int, heading: str, text: str) -> web.Response:
        message = Page(page.path, page.title, "message.html", page.content)
        return await self._page(message, False, {"heading": heading, "text": text}, status)

    async def _page(
        self, page: Page, is_owner: bool, content: Mapping[str, Any], status: int = 200
    ) -> web.Response:
        menu = [each for each in self._pages if each.in_menu and (is_owner or not each.is_private)]
        text = await asyncio.to_thread(
            self._templates.get_template(page.template).render,
            {"menu": menu, "here": page, "state": self._reader.summary(), "is_owner": is_owner}
            | dict(content),
        )
        return web.Response(text=text, content_type="text/html", status=status)

    async def curve(self, request: web.Request) -> web.Response:
        asked, is_owner = dict(request.query), self._owner.is_at(request)
        try:
            found = await asyncio.to_thread(self._views.curve, asked, is_owner)
        except WorkerError as error:
            return web.json_response({"error": str(error)}, status=503)
        if found is None:
            raise web.HTTPNotFound
        return web.json_response(found)

    async def owner(self, request: web.Request) -> web.Response:
        return await self._ask_token(request, is_wrong=False)

    async def sign_in(self, request: web.Request) -> web.Response:
        if request.headers.get("Origin") is None:
            raise web.HTTPForbidden(reason="expected the form of /owner")
        form = await request.post()
        response = self._owner.sign_in(request, str(form.get("token", "")))
        return response or await self._ask_token(request, is_wrong=True)

    async def _ask_token(self, request: web.Request, is_wrong: bool) -> web.Response:
        content = {
            "is_wrong": is_wrong,
            "can_be_here": self._owner.can_be_at(request),
            "file": self._owner.file,
        }
        is_owner = self._owner.is_at(request)
        return await self._page(self._sign_in, is_owner, content, 403 if is_wrong else 200)


# ---- filters of templates


def clipped(text: str, head: int, tail: int) -> str:
    """Return the first and last characters of a long text."""
    return text if len(text) <= head + tail + 1 else f"{text[:head]}…{text[-tail:]}"


def decimal(value: float, digits: int) -> str:
    """Return a number with that many digits after the point."""
    # A contract or node that lies may send any number.
    return f"{value:.1e}" if abs(value) >= 1e7 else f"{value:,.{digits}f}"


def _clock(seconds: float) -> str:
    """Return a time in UTC, with the date unless it is today's."""
    at = _time(seconds)
    is_today = at[:3] == time.gmtime()[:3]
    return time.strftime("%H:%M:%S UTC" if is_today else "%Y-%m-%d %H:%M UTC", at)


def _age(seconds: float) -> str:
    """Return a duration in its largest unit."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds // unit:,.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", _time(seconds))


def _time(seconds: float) -> time.struct_time:
    """Return a time in UTC; a chain or node that lies may send any number."""
    return time.gmtime(min(max(seconds, 0), 2**32))
