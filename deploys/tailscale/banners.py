"""Show banners of ssh servers, which they send before a login.

Tailscale's ssh server in check mode sends a URL in a banner and accepts the method `none`, which
paramiko never tries, after a person has opened the URL. If the tailnet's policy rejects the login,
only the banner says so.
"""

import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

import gevent
from paramiko import SSHClient, SSHException, Transport

from worker.log import printable

ASK_EVERY_SECONDS = 0.2
# Time limit for a server that is silent while it authenticates; paramiko's own limit.
SILENT_SECONDS = 30
# Time limit for a person to open the URL of a banner.
PERSON_SECONDS = 300
# Name of paramiko's attribute.
_AUTHENTICATE = "_auth"

# Name of the host that is connected to.
connecting: ContextVar[str] = ContextVar("connecting", default="ssh server")


def show() -> None:
    """Make every ssh connection of this process show banners and try the method `none` last."""
    # The only place at which paramiko has a connection, but no login yet.
    setattr(SSHClient, _AUTHENTICATE, _shown(getattr(SSHClient, _AUTHENTICATE)))


def _shown(auth: Callable[..., None]) -> Callable[..., None]:
    @wraps(auth)
    def auth_and_show(
        client: SSHClient,
        username: str,
        *rest: Any,
        **named: Any,
    ) -> None:
        transport = cast(Transport, client.get_transport())
        transport.auth_timeout = PERSON_SECONDS
        shown: set[str] = set()
        watch = gevent.spawn(_watch, transport, connecting.get(), shown)
        try:
            auth(client, username, *rest, **named)
        except SSHException as refused:
            if not transport.is_active():
                raise
            try:
                transport.auth_none(username)
            except SSHException:
                raise refused from None
        finally:
            watch.kill()
            _print_banner(transport, connecting.get(), shown)

    return auth_and_show


def _watch(
    transport: Transport,
    name: str,
    shown: set[str],
) -> None:
    """Print banners as they come; close a connection without any banner or login in time."""
    deadline = time.monotonic() + SILENT_SECONDS
    while shown or time.monotonic() < deadline:
        _print_banner(transport, name, shown)
        gevent.sleep(ASK_EVERY_SECONDS)
    transport.close()


def _print_banner(
    transport: Transport,
    name: str,
    shown: set[str],
) -> None:
    banner = getattr(transport.auth_handler, "banner", None)
    if not banner:
        return
    text = banner.decode(errors="replace") if isinstance(banner, bytes) else str(banner)
    if text not in shown:
        shown.add(text)
        for line in text.splitlines():
            if line.strip():
                print(f"{name} says: {printable(line.strip())}", file=sys.stderr, flush=True)
