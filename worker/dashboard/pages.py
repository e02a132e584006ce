"""The dashboard's pages: each is a row of `PAGES`, a template, and a function that fills it.

The server draws the pages; they are complete without JavaScript. Untrusted text is escaped by the
templates.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from worker.market_view import rendering
from worker.runtime import webpages
from worker.settings import Settings

_FOLDER = Path(__file__).parent / "page"
HEADERS = {
    # All parts of a page come from this server, and nothing in the shown text may run.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Page:
    """A page: `content` returns the values of its template, for a request's path and query.

    It runs in a thread. `title` is its name in the menu.
    """

    path: str
    title: str
    template: str
    content: Callable[[Mapping[str, str]], Mapping[str, Any]]


class Pages:
    """The pages of a dashboard with these settings."""

    def __init__(self, settings: Settings, pages: tuple[Page, ...]) -> None:
        self._accounts_url = settings.dashboard.accounts_url
        self._pages = pages
        self._templates = webpages.templates(_FOLDER, rendering.FOLDER)
        rendering.prepare(self._templates)

    def add_to(self, application: web.Application) -> None:
        files = ("page.css", "page.js", "market.js")
        webpages.add_files(application, _FOLDER, files, {})
        webpages.add_file(application, rendering.STYLE, {})
        for page in self._pages:
            application.router.add_get(page.path, self._handler(page))

    def _handler(self, page: Page) -> Callable[[web.Request], Any]:
        async def answer(request: web.Request) -> web.Response:
            asked = {**request.query, **request.match_info}
            text = await asyncio.to_thread(self._render, page, asked)
            return web.Response(text=text, content_type="text/html")

        return answer

    def _render(self, page: Page, asked: Mapping[str, str]) -> str:
        return self._templates.get_template(page.template).render(
            pages=self._pages, here=page, accounts_url=self._accounts_url, **page.content(asked)
        )
