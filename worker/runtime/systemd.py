"""Notify systemd (sd_notify(3)) of readiness, progress and a status line for `systemctl status`.

Without systemd, every call does nothing. Only `progress`, which the round loop calls when it has
made progress, pings the watchdog: a worker that hangs stops pinging and is restarted.
"""

import socket

_socket: socket.socket | None = None


def connect(address: str | None) -> None:
    """Use systemd's notification socket at `address` ($NOTIFY_SOCKET); None: not run by systemd."""
    global _socket
    if address is None:
        return
    _socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    _socket.connect("\0" + address[1:] if address.startswith("@") else address)


def ready() -> None:
    _send("READY=1")


def progress(status: str) -> None:
    """Ping the watchdog and show `status` in `systemctl status`."""
    _send(f"WATCHDOG=1\nSTATUS={status}")


def stopping(status: str) -> None:
    _send(f"STOPPING=1\nSTATUS={status}")


def _send(message: str) -> None:
    if _socket is not None:
        _socket.sendall(message.encode())
