"""Checks of the host before a role starts: a free port, disk space, an exclusive state folder."""

import errno
import fcntl
import os
import shutil
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from worker.errors import ResourceError
from worker.runtime.state_dir import StateDir

# Linux: the address of an interface (netdevice(7)).
SIOCGIFADDR = 0x8915
_MAX_INTERFACE_NAME = 15  # bytes (IFNAMSIZ, with its NUL)
_IPV6_TABLE = Path("/proc/net/if_inet6")
# The file has the scope and flags of each address: global; temporary, deprecated, duplicate or
# unchecked.
_SCOPE_GLOBAL, _UNUSABLE = 0x00, 0x01 | 0x20 | 0x08 | 0x40


def require_port(
    host: str,
    port: int,
    key: str,
) -> None:
    """Raise ResourceError if no process can listen on TCP `port` of `host`; 0 is always free.

    `key` names the port's setting. The error names the host's setting, which is next to it, if the
    host is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (socket.gaierror, UnicodeError) as error:
            raise _wrong_host(host, key, getattr(error, "strerror", None) or str(error)) from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise _wrong_host(host, key, "no address of this machine") from None
            reason = (
                "already in use"
                if error.errno == errno.EADDRINUSE
                else (error.strerror or str(error))
            )
            raise ResourceError(
                f"port {port} ({key}): {reason} on {host}; free it or set another,"
                " 0 lets the kernel choose"
            ) from None


def free_ports(names: Sequence[str]) -> dict[str, int]:
    """Return a different free TCP port of loopback for each name."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in names]
        ports = [int(probe.getsockname()[1]) for probe in probes]
    return dict(zip(names, ports, strict=True))


def _wrong_host(
    host: str,
    port_key: str,
    reason: str,
) -> ResourceError:
    key = f"{port_key.removesuffix('port')}host"
    return ResourceError(
        f"{host} ({key}): {reason}; expected an address of this machine, or 0.0.0.0 for all of them"
    )


def require_disk(
    folder: Path,
    min_free_mb: int,
    key: str = "node.state_dir",
) -> None:
    """Create `folder`, and raise ResourceError if its disk has too little free space.

    `min_free_mb` is in 10^6 bytes.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_mb = shutil.disk_usage(folder).free // 10**6
    except OSError as error:
        raise ResourceError(
            f"{folder} ({key}): {error.strerror}; expected a folder that can be written"
        ) from None
    if free_mb < min_free_mb:
        raise ResourceError(
            f"{folder} ({key}): {free_mb} MB free; expected at least {min_free_mb} MB "
            "(node.min_free_disk_mb); make room or name a folder on another disk"
        )


def lock_folder(folder: Path, key: str) -> IO[str]:
    """Lock `folder` for this process, until the returned file is closed or the process ends.

    Raises ResourceError with the process id of the other one. `key` names the setting.
    """
    lock = StateDir(folder).lock.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        pid = lock.read().strip() or "unknown"
        lock.close()
        raise ResourceError(
            f"{folder} ({key}): in use by process {pid}; stop that one, or name another folder"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def interface_address(
    name: str,
    family: int = socket.AF_INET,
) -> str | None:
    """Return the address of a network interface in a family.

    None: there is no such interface, or it has no address now. For IPv6 it is the first global
    address that is neither temporary nor still being checked.
    """
    if family == socket.AF_INET6:
        return next(_global_ipv6(name), None)
    if len(name.encode()) > _MAX_INTERFACE_NAME:
        return None  # the kernel would truncate it, perhaps to another interface's name
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL):
                return None
            raise
    return socket.inet_ntoa(answer[20:24])


def _global_ipv6(name: str) -> Iterator[str]:
    for line in _IPV6_TABLE.read_text().splitlines() if _IPV6_TABLE.exists() else ():
        digits, _, _, scope, flags, interface = line.split()
        is_usable = int(scope, 16) == _SCOPE_GLOBAL and not int(flags, 16) & _UNUSABLE
        if interface == name and is_usable:
            yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
