"""Limit how long a host may be silent, so that a host that vanishes or freezes delays no other.

pyinfra's `_timeout` limits the wait for a command's output, but paramiko's waits for a channel, for
the start of a command, for its exit code and for a file transfer have no limit, or one of an hour.
And the kernel of a machine with frozen programs still acknowledges packets. So the host's sshd is
queried regularly; if it does not answer, the connection is closed, which ends every wait.

paramiko reports a connection that ends as EOFError, which pyinfra does not expect and which would
end the whole run. It is translated to OSError, which fails only that host.
"""

import errno
from collections.abc import Callable
from functools import wraps
from typing import Any

import gevent
from paramiko import SSHException, Transport
from pyinfra.api.host import Host
from pyinfra.connectors.ssh import SSHConnector

from deploys.tailscale import banners

ASK_EVERY_SECONDS = 10
SILENCE_SECONDS = 40
RENEW_SECONDS = 25


def limit_silence() -> None:
    """Make every ssh connection of this process end when its host is silent; for config.py."""
    SSHConnector.connect = _watched(SSHConnector.connect)


def renew(host: Host) -> None:
    """Reconnect to a host with a new connection. Raises the errors of connecting."""
    connector = host.connector
    if connector.client is not None:
        connector.client.close()
    connector.disconnect()
    # Otherwise a server that vanishes while it authenticates would be given a person's time limit.
    with gevent.Timeout(RENEW_SECONDS, TimeoutError(f"no connection within {RENEW_SECONDS} s")):
        connector.connect()


def _watched(connect: Callable[[SSHConnector], None]) -> Callable[[SSHConnector], None]:
    @wraps(connect)
    def connect_and_watch(connector: SSHConnector) -> None:
        banners.connecting.set(connector.host.name)
        connect(connector)
        connector.run_shell_command = _translated(connector.run_shell_command, connector.host.name)
        gevent.spawn(_watch, connector.client.get_transport())

    return connect_and_watch


def _watch(transport: Transport) -> None:
    """Close the connection when its other end does not answer."""
    while transport.is_active():
        gevent.sleep(ASK_EVERY_SECONDS)
        with gevent.Timeout(SILENCE_SECONDS, False):
            try:
                transport.global_request("keepalive@openssh.com", wait=True)
            except (OSError, EOFError, SSHException):
                return
            continue
        transport.close()


def _translated(
    run: Callable[..., Any],
    name: str,
) -> Callable[..., Any]:
    @wraps(run)
    def run_or_oserror(*arguments: Any, **options: Any) -> Any:
        try:
            return run(*arguments, **options)
        except EOFError as error:
            raise OSError(errno.ECONNRESET, f"the connection to {name} has ended") from error

    return run_or_oserror
