"""HTTP for the chain's clients, with limits on the size and the time of an answer.

requests limits neither: its timeout applies to each read, and it reads a body to the end, however
long it is.
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
"""Prefix of the address of a chain that listens on a Unix socket: unix:/PATH."""
MAX_ANSWER_BYTES = 32 << 20
"""Twice the account service's limit. Logs, the longest answers, are requested in pieces."""
_PIECE_BYTES = 1 << 16
_MAX_SOCKET_NAME = 107


class AnswerTooLong(requests.RequestException):
    """The answer has more than MAX_ANSWER_BYTES."""


def open_session() -> requests.Session:
    """Return a session in which a request's `timeout` (a number) limits the whole answer.

    It ignores the environment's proxies and .netrc, because .netrc would replace our token.
    """
    session = requests.Session()
    session.trust_env = False
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Bounded())
    session.mount(UNIX, _OverSocket())
    return session


@functools.cache
def socket_name(path: Path) -> str:
    """Return the socket's path, or an alias of at most 107 bytes, the kernel's limit."""
    if len(os.fsencode(path)) <= _MAX_SOCKET_NAME:
        return str(path)
    # The folder stays open, because the name is valid only as long as it is open.
    folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    return f"/proc/self/fd/{folder}/{path.name}"


class _Bounded(HTTPAdapter):
    """Adapter that reads bodies in pieces. Raises AnswerTooLong and requests' own errors."""

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
    """Adapter that connects to the Unix socket in the address."""

    def get_connection_with_tls_context(self, request: Any, *more: Any, **options: Any) -> Any:
        path = str(request.url).removeprefix(UNIX)
        if path not in self._pools:
            self._pools[path] = _SocketPool(Path(path))
        return self._pools[path]

    @functools.cached_property
    def _pools(self) -> dict[str, "_SocketPool"]:
        return {}

    def request_url(
        self,
        request: Any,
        proxies: Any,
    ) -> str:
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
                raise requests.ReadTimeout("the answer was not complete in time")
    except urllib3.exceptions.ReadTimeoutError as error:
        raise requests.ReadTimeout(error) from None
    except urllib3.exceptions.DecodeError as error:
        raise requests.exceptions.ContentDecodingError(error) from None
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(error) from None
    return bytes(body)
