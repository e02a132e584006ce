"""A limit on how long a host may be silent, so that one that vanishes does not hold the run of all the others.

pyinfra's `_timeout` limits the wait for a command's output; paramiko's waits for a channel, for the start of a command,
for its exit code and for a file transfer have no limit, or an hour. With this the connection itself ends, and with it
every wait, once what was sent has found no acknowledgement for a while.

A connection that ends is an EOFError to paramiko, and one that pyinfra does not expect: it would end the whole run. It
is handed on as the OSError that it is, which fails that host.
"""

import errno
import socket
from collections.abc import Callable
from functools import wraps
from typing import Any

from pyinfra.api.host import Host
from pyinfra.connectors.ssh import SSHConnector

ASK_EVERY_SECONDS = 10
SILENCE_SECONDS = 30


def limit_silence(of: Host) -> None:
    """End the host's ssh connection when it is silent for about 40 s. Through a jump host, or on macOS: no limit."""
    connector = of.connector
    if not isinstance(connector, SSHConnector) or connector.client is None:
        return
    transport = connector.client.get_transport()
    if transport is None or not hasattr(socket, "TCP_USER_TIMEOUT") or not hasattr(transport.sock, "setsockopt"):
        return
    connector.run_shell_command = _translated(connector.run_shell_command, of.name)
    transport.set_keepalive(ASK_EVERY_SECONDS)
    transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_SECONDS * 1000)


def _translated(run: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(run)
    def run_or_oserror(*arguments: Any, **options: Any) -> Any:
        try:
            return run(*arguments, **options)
        except EOFError as error:
            raise OSError(errno.ECONNRESET, f"the connection to {name} has ended") from error

    return run_or_oserror
