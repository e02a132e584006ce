"""HTTP as the chain's clients speak it: whoever answers, an answer has a size and a time.

requests itself bounds neither: its time-out is for each read, and a body is taken in to its end,
however far that is.
"""

import functools
import io
import os
import socket
import time
from pathlib import Path
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

UNIX = "unix:"
"""Begins the address of a chain that answers at a socket: unix:/PATH."""
MAX_ANSWER_BYTES = 32 << 20
"""Twice what the account service passes on. The longest are logs, which are asked for in pieces."""
_PIECE_BYTES = 1 << 16
_MAX_SOCKET_NAME = 107


class AnswerTooLong(requests.RequestException):
    """More than MAX_ANSWER_BYTES."""


def open_session() -> requests.Session:
    """A session whose requests' `timeout` (a number) is for the whole answer. No proxies and no
    .netrc of the environment: the latter would replace our token."""
    session = requests.Session()
    session.trust_env = False
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Bounded())
    session.mount(UNIX, _OverSocket())
    return session


@functools.cache
def socket_name(path: Path) -> str:
    """The socket's path, or another name for it that is no longer than the kernel takes (107
    bytes)."""
    if len(os.fsencode(path)) <= _MAX_SOCKET_NAME:
        return str(path)
    folder = os.open(
        path.parent, os.O_PATH | os.O_CLOEXEC
    )  # stays open: the name is good as long as this is
    return f"/proc/self/fd/{folder}/{path.name}"


class _Bounded(HTTPAdapter):
    """Takes in the body itself, as it comes. Raises AnswerTooLong and requests' own errors."""

    def send(
        self, request: Any, stream: bool = False, timeout: Any = None, *more: Any, **options: Any
    ) -> Any:
        deadline = time.monotonic() + timeout
        response = super().send(request, True, timeout, *more, **options)
        try:
            response.raw = io.BytesIO(_read(response.raw, deadline))
        except BaseException:
            response.close()
            raise
        return response


class _OverSocket(_Bounded):
    """The same, to the socket that the address names."""

    def get_connection_with_tls_context(self, request: Any, *more: Any, **options: Any) -> Any:
        return self._pool(str(request.url).removeprefix(UNIX))

    @functools.cached_property
    def _pools(self) -> dict[str, "_SocketPool"]:
        return {}

    def _pool(self, path: str) -> "_SocketPool":
        if path not in self._pools:
            self._pools[path] = _SocketPool(Path(path))
        return self._pools[path]

    def request_url(self, request: Any, proxies: Any) -> str:
        return "/"

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        super().close()


class _SocketPool(urllib3.HTTPConnectionPool):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def _new_conn(self) -> Any:
        return _SocketConnection(self._path)


class _SocketConnection(urllib3.connection.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def _new_conn(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            timeout = self.timeout
            sock.settimeout(timeout if isinstance(timeout, (int, float)) else None)
            sock.connect(socket_name(self._path))
        except OSError as error:
            sock.close()
            raise urllib3.exceptions.NewConnectionError(self, str(error)) from error
        return sock


def _read(raw: urllib3.HTTPResponse, deadline: float) -> bytes:
    body = bytearray()
    try:
        while piece := raw.read1(_PIECE_BYTES, decode_content=True):
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                raise AnswerTooLong(f"more than {MAX_ANSWER_BYTES} bytes")
            if time.monotonic() > deadline:
                raise requests.ReadTimeout("the answer goes on and on")
    except urllib3.exceptions.ReadTimeoutError as error:
        raise requests.ReadTimeout(error) from None
    except urllib3.exceptions.DecodeError as error:
        raise requests.exceptions.ContentDecodingError(error) from None
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(error) from None
    return bytes(body)
