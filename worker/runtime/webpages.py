"""The common part of all pages: frame, style, icon, templates, and static files."""

import time
from collections.abc import Mapping
from pathlib import Path

import jinja2
from aiohttp import web
from aiohttp.typedefs import Handler

from worker.log import printable

_ASSETS = Path(__file__).parent / "assets"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def templates(*folders: Path) -> jinja2.Environment:
    """Return the templates in folders, and frame.html, which all pages extend.

    All text is escaped; an unknown name in a template is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, _ASSETS]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["day"] = _day
    return environment


def add_files(
    application: web.Application, folder: Path, names: tuple[str, ...], headers: Mapping[str, str]
) -> None:
    """Serve these files of a folder at /NAME, and the style and icon that all pages share."""
    files = [_ASSETS / "base.css", _ASSETS / "icon.svg", *(folder / name for name in names)]
    for file in files:
        add_file(application, file, headers)


def add_file(application: web.Application, file: Path, headers: Mapping[str, str]) -> None:
    """Serve a file at /NAME."""
    handler = _serving(file.read_bytes(), _TYPES[file.suffix], headers)
    application.router.add_get(f"/{file.name}", handler)


def _serving(body: bytes, content_type: str, headers: Mapping[str, str]) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)

    return answer


def _day(seconds: float | None) -> str:
    """Return a time in UTC; a dash for None."""
    if seconds is None:
        return "–"
    return printable(time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)))
