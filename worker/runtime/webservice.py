"""The common part of the roles that answer HTTP: listening, start and orderly shutdown."""

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from worker.errors import ResourceError
from worker.log import printable
from worker.runtime import systemd, webguard
from worker.runtime.files import write_whole
from worker.runtime.host import lock_folder, require_port
from worker.settings import Account

_LOOPBACK = "127.0.0.1"
_BACKLOG = 512


class Section(Protocol):
    """The settings of a role that answers HTTP; `names`: domain names under which it is reached."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def state_dir(self) -> Path: ...


class Service(Protocol):
    """The part that answers requests. `tend` does its background work, and never returns."""

    def application(self) -> web.Application: ...

    def started(self, url: str) -> None:
        """Log that the service now answers at `url`; called once."""

    async def tend(self) -> None: ...


def new_application(max_body_bytes: int) -> web.Application:
    """Return an application that answers errors with {"error": SENTENCE}."""
    return web.Application(client_max_size=max_body_bytes, middlewares=[_answer_errors])


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return web.json_response(
            {"error": f"{printable(request.path)}: {error.reason}"}, status=error.status
        )


def run(
    role: str,
    section: Section,
    make: Callable[[], Service],
) -> None:
    """Serve the service that `make` returns until SIGTERM or SIGINT.

    Its URL is written to `<state_dir>/address` when it is ready. `role` names the section of the
    settings. Raises ResourceError if the port is in use or the folder can't be used, and whatever
    `make` raises.
    """
    for host in _hosts(section.host):
        require_port(host, section.port, f"{role}.port")
    folder = section.state_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{folder} ({role}.state_dir): {error.strerror}; expected a writable folder"
        ) from None
    with lock_folder(folder, f"{role}.state_dir"):
        asyncio.run(_serve(section, make))


async def _serve(
    section: Section,
    make: Callable[[], Service],
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    service = make()
    webguard.raise_file_limit()
    tending = asyncio.create_task(service.tend())
    stopping = asyncio.create_task(stop.wait())
    end: Callable[[], Awaitable[None]] | None = None
    try:
        sockets, port = [], section.port
        for host in _hosts(section.host):
            # The family of the address, or of the first address of the name.
            family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
            sockets.append(socket.create_server((host, port), family=family, backlog=_BACKLOG))
            port = int(sockets[0].getsockname()[1])
        end = await webguard.serve(service.application(), sockets, _names(section))
        url = _url(section.host, port)
        write_whole(section.state_dir / "address", url + "\n")
        service.started(url)
        systemd.ready()
        await asyncio.wait({stopping, tending}, return_when=asyncio.FIRST_COMPLETED)
        if tending.done():
            tending.result()  # `tend` ends only with an unexpected error, which this raises
    finally:
        systemd.stopping("closing")
        tending.cancel()
        stopping.cancel()
        if end is not None:
            await end()


def _names(section: Section) -> tuple[str, ...]:
    """Return the names under which browsers may reach the service."""
    public_url = section.public_url if isinstance(section, Account) else None
    name = urlsplit(public_url or "").hostname
    return section.names if name is None else (*section.names, name)


def _hosts(host: str) -> tuple[str, ...]:
    """Return the hosts to listen on: the configured one, and loopback for local clients.

    Most versions of `tailscale serve` proxy to 127.0.0.1 and nowhere else.
    """
    return (host,) if host in (_LOOPBACK, "localhost", "0.0.0.0", "::") else (host, _LOOPBACK)  # noqa: S104


def _url(host: str, port: int) -> str:
    """Return the URL that reaches us from this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
