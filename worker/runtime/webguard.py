"""Limits and checks for an HTTP server that anyone may reach.

A connection without a complete request for some time (it has sent nothing or part of a head, or
waits between requests) is closed. The number of connections is limited in total and per address. To
make room, idle connections are closed first, then those whose client keeps the server waiting.
Requests that web pages make are accepted only from the server's own pages.
"""

import asyncio
import ipaddress
import logging
import resource
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from worker.log import printable

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
MAX_CONNECTIONS_OF_ONE = 256
"""Number of connections from an address: nodes behind one router share its address.

For IPv6 it is the number from a /64 network, because a single host has a whole such network.
"""
HEAD_SECONDS = 10.0
"""Time from the start of the connection until the head of the first request is complete."""
IDLE_SECONDS = 30.0
"""Time between two requests of a connection."""
BUSY_SECONDS = 120.0
"""Time of one request, including its answer."""
MAX_AHEAD_BYTES = 1 << 20
"""Bytes of further requests that may arrive before the current one is answered."""
_SWEEP_SECONDS = 0.5
_LOG_SECONDS = 60.0

FORMS = web.AppKey("forms", bool)
"""Key of an application: whether it accepts forms at paths outside /api and /rpc."""
_FORM = "application/x-www-form-urlencoded"

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# Headers that browsers send and other clients do not: they identify requests of web pages.
_OF_BROWSERS = (
    "Origin",
    "Referer",
    "Cookie",
    "Sec-Fetch-Site",
    "Sec-Fetch-Mode",
    "Accept-Language",
)
_LOCAL_NAMES = ("localhost", "local", "internal", "lan", "home.arpa", "ts.net")


class Sparingly:
    """Log at most one line per minute of each kind, with the number of omitted lines."""

    def __init__(self, seconds: float = _LOG_SECONDS) -> None:
        self._seconds = seconds
        self._said_at: dict[str, float] = {}
        self._left_out: Counter[str] = Counter()

    def warn(self, kind: str, message: str) -> None:
        now = time.monotonic()
        if now - self._said_at.get(kind, -self._seconds) < self._seconds:
            self._left_out[kind] += 1
            return
        self._said_at[kind] = now
        left_out = self._left_out.pop(kind, 0)
        log.warning(
            "%s%s", message, f" (and {left_out} more of this kind before)" if left_out else ""
        )


def source_of(address: str) -> str:
    """Return the client that an address belongs to: an IPv4 address, or an IPv6 /64 network."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    if parsed.is_loopback or parsed.is_link_local:
        return str(parsed)
    return str(ipaddress.IPv6Network((int(parsed), 64), strict=False))


def is_loopback(source: str) -> bool:
    """Return whether a client is on this machine."""
    return source == "::1" or source.startswith("127.")


class Guard:
    """Creates the connections of one server. `sweep` runs next to it, forever."""

    def __init__(
        self,
        names: tuple[str, ...] = (),
    ) -> None:
        self.server: Callable[[], asyncio.Protocol] | None = None
        self._names = names
        self._open: dict[asyncio.BaseTransport, _Connection] = {}
        self._of: Counter[str] = Counter()
        self._sparingly = Sparingly()

    def __call__(self) -> asyncio.Protocol:
        if self.server is None:
            raise RuntimeError("the server is not set up yet")
        return _Connection(self, self.server())

    async def sweep(self) -> None:
        while True:
            now = time.monotonic()
            for connection in list(self._open.values()):
                if reason := connection.overdue(now):
                    self._sparingly.warn(
                        "overdue", f"connection closed from={connection.address}: {reason}"
                    )
                    connection.abort()
            await asyncio.sleep(_SWEEP_SECONDS)

    def admit(self, connection: "_Connection") -> bool:
        """Return whether there is room for a connection.

        If necessary, another one whose client keeps the server waiting is closed.
        """
        address, source = connection.address, connection.source
        if self._of[source] >= MAX_CONNECTIONS_OF_ONE and not is_loopback(source):
            is_admitted = self._make_room(
                [each for each in self._open.values() if each.source == source]
            )
        elif len(self._open) >= MAX_CONNECTIONS:
            is_admitted = self._make_room(list(self._open.values()))
        else:
            is_admitted = True
        if not is_admitted:
            self._sparingly.warn(
                "full", f"connection refused from={address}: {len(self._open)} are open"
            )
            return False
        self._open[connection.transport] = connection
        self._of[source] += 1
        return True

    def _make_room(self, among: list["_Connection"]) -> bool:
        """Close the oldest idle connection, or else the oldest whose client sends or reads slowly.

        Requests that this server is working on are never aborted.
        """
        given_up = [each for each in among if each.is_idle] or [
            each for each in among if each.is_stalled
        ]
        if not given_up:
            return False
        oldest = min(given_up, key=lambda each: each.since)
        self._sparingly.warn(
            "room", f"connection closed from={oldest.address}: to make room for others"
        )
        oldest.abort()
        return True

    def forget(self, connection: "_Connection") -> None:
        if self._open.pop(connection.transport, None) is not None:
            self._of[connection.source] -= 1
            if not self._of[connection.source]:
                del self._of[connection.source]

    # ---- requests

    @web.middleware
    async def middleware(
        self,
        request: web.Request,
        handler: Handler,
    ) -> web.StreamResponse:
        connection = self._open.get(request.transport) if request.transport is not None else None
        if connection is not None:
            connection.begin(request)
        try:
            refusal = self.refusal(request)
            return await handler(request) if refusal is None else refusal
        except ConnectionError:
            return _refused(400, "body: truncated")  # the client is gone
        finally:
            if connection is not None:
                connection.end()

    def refusal(
        self,
        request: web.Request,
    ) -> web.Response | None:
        """Return the refusal of a malformed request, or of one that a foreign web page made.

        None for all other requests.
        """
        if not _has_text_headers(request):
            return _refused(400, "headers: got bytes that are not UTF-8; expected text")
        if "Content-Encoding" in request.headers:
            return _refused(415, "Content-Encoding: got a compressed body; send it uncompressed")
        # Unknown paths and methods are answered with 404 or 405 anyway.
        is_served = request.match_info.http_exception is None
        if request.method == "POST" and is_served and not _has_expected_body(request):
            shown = printable(request.content_type)[:60]
            return _refused(415, f"Content-Type: got {shown}; expected application/json")
        is_browser = request.headers.get("User-Agent", "").startswith("Mozilla/")
        if is_browser or any(name in request.headers for name in _OF_BROWSERS):
            return self._refusal_of_page(request)
        return None

    def _refusal_of_page(
        self,
        request: web.Request,
    ) -> web.Response | None:
        """Return the refusal of a browser's request, by the origin of the page that sent it."""
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        is_plain = host.isascii() and host.isprintable() and not set(host) & set("/?#@\\ ")
        if not self._is_ours(_name_in(host) if is_plain else ""):
            return _refused(
                421, f"Host: {printable(host)[:80]} is not a name of this service; use its address"
            )
        if origin is not None and _place_in(origin) != host.lower():
            return _refused(
                403, f"Origin: {printable(origin)[:80]}: pages of others may not use this service"
            )
        is_own = request.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
        is_link = request.method == "GET" and request.headers.get("Sec-Fetch-Mode") == "navigate"
        if not is_own and not is_link:
            return _refused(403, "Sec-Fetch-Site: pages of others may not use this service")
        return None

    def _is_ours(self, name: str) -> bool:
        """Return whether a name can only be ours: an address, one without dots, or configured."""
        with suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        name = name.lower().rstrip(".")
        own = (*self._names, socket.gethostname(), socket.getfqdn())
        is_local = any(name == local or name.endswith(f".{local}") for local in _LOCAL_NAMES)
        return bool(name) and (
            "." not in name or is_local or name in (each.lower() for each in own)
        )


def _has_text_headers(request: web.Request) -> bool:
    """Return whether all headers are UTF-8; aiohttp represents other bytes as lone surrogates."""
    try:
        "".join(request.headers.values()).encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_expected_body(request: web.Request) -> bool:
    """Return whether the body is JSON, or a form at a page that accepts forms."""
    is_page = request.app.get(FORMS, False) and not request.path.startswith(("/api/", "/rpc"))
    return request.content_type == "application/json" or (is_page and request.content_type == _FORM)


async def _add_headers(
    request: web.Request,
    response: web.StreamResponse,
) -> None:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)


def _name_in(host: str) -> str:
    """Return the name or address in a Host header, without the port; empty if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _place_in(origin: str) -> str:
    """Return name and port of an Origin header, in lower case; empty if it is malformed."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _refused(status: int, reason: str) -> web.Response:
    return web.json_response({"error": reason}, status=status)


class _Connection(asyncio.Protocol):
    """Wraps the server's protocol for one connection, and measures time."""

    def __init__(
        self,
        guard: Guard,
        inner: asyncio.Protocol,
    ) -> None:
        self._guard = guard
        self._inner = inner
        self.transport: asyncio.Transport
        self.address = self.source = ""
        self.since = time.monotonic()
        self._request: web.Request | None = None
        self._had_request = False
        self._num_ahead = 0

    @property
    def is_idle(self) -> bool:
        return self._request is None and not self.transport.get_write_buffer_size()

    @property
    def is_stalled(self) -> bool:
        """Return whether the server waits for the client to send a body or to read the answer."""
        is_sending = self._request is not None and not self._request.content.is_eof()
        return is_sending or self.transport.get_write_buffer_size() > 0

    def begin(self, request: web.Request) -> None:
        """Record that the whole head of a request has arrived."""
        self._request, self._had_request = request, True
        self.since, self._num_ahead = time.monotonic(), 0

    def end(self) -> None:
        self._request = None
        self.since = time.monotonic()

    def overdue(self, now: float) -> str | None:
        waited = now - self.since
        if not self.is_idle:
            return f"a request took more than {BUSY_SECONDS:g} s" if waited > BUSY_SECONDS else None
        limit = IDLE_SECONDS if self._had_request else HEAD_SECONDS
        return f"no request within {limit:g} s" if waited > limit else None

    def abort(self) -> None:
        self._guard.forget(self)
        self.transport.abort()

    # ---- asyncio's

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        peer = transport.get_extra_info("peername")
        self.address = peer[0].partition("%")[0] if isinstance(peer, tuple) else "127.0.0.1"
        self.source = source_of(self.address)
        self._inner.connection_made(transport)
        if not self._guard.admit(self):
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self._num_ahead += len(data)
        if self._num_ahead > MAX_AHEAD_BYTES:
            self.abort()
            return
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.forget(self)
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


class _OncePerMinute(logging.Filter):
    """Pass one line per minute, without its traceback, of the records that `is_meant` selects."""

    def __init__(
        self,
        is_meant: Callable[[logging.LogRecord], bool],
    ) -> None:
        super().__init__()
        self._is_meant = is_meant
        self._said_at = -_LOG_SECONDS

    def filter(self, record: logging.LogRecord) -> bool:
        if not self._is_meant(record):
            return True
        now = time.monotonic()
        is_said = now - self._said_at >= _LOG_SECONDS
        if is_said:
            self._said_at = now
            error = record.exc_info[1] if record.exc_info else None
            reason = f": {printable(str(error))[:200]}" if error else ""
            record.msg, record.args, record.exc_info = f"{record.getMessage()}{reason}", None, None
        return is_said


def _is_out_of_files(record: logging.LogRecord) -> bool:
    """Return whether asyncio ran out of a system resource; it logs a traceback for each attempt."""
    return "system resource" in record.getMessage()


def _is_bad_request(record: logging.LogRecord) -> bool:
    """Return whether aiohttp could not parse a request; it logs a traceback for each."""
    return record.exc_info is not None and isinstance(record.exc_info[1], HttpProcessingError)


_OUT_OF_FILES, _BAD_REQUESTS = _OncePerMinute(_is_out_of_files), _OncePerMinute(_is_bad_request)


def raise_file_limit() -> None:
    """Raise the limit of open files, as far as the system permits, to above MAX_CONNECTIONS."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = (
        4 * MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(4 * MAX_CONNECTIONS, hard)
    )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def serve(
    application: web.Application,
    sockets: list[socket.socket],
    names: tuple[str, ...] = (),
) -> Callable[[], Awaitable[None]]:
    """Serve the application on these sockets, guarded. Return a function that ends it."""
    logging.getLogger("asyncio").addFilter(_OUT_OF_FILES)
    logging.getLogger("aiohttp.server").addFilter(_BAD_REQUESTS)
    guard = Guard(names)
    application.middlewares.insert(0, guard.middleware)
    application.on_response_prepare.insert(0, _add_headers)
    runner = web.AppRunner(
        application,
        access_log=None,
        shutdown_timeout=5.0,
        keepalive_timeout=IDLE_SECONDS,
        auto_decompress=False,
    )
    await runner.setup()
    guard.server = runner.server
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(guard, sock=sock) for sock in sockets]
    sweeping = asyncio.create_task(guard.sweep())

    async def stop() -> None:
        sweeping.cancel()
        for server in servers:
            server.close()
        await runner.cleanup()

    return stop
