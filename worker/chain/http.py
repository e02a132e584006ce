"""HTTP as the chain's clients speak it: whoever answers, an answer has a size and a time.

requests itself bounds neither: its time-out is for each read, and a body is taken in to its end, however far that is.
"""

import io
import time
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

MAX_ANSWER_BYTES = 32 << 20
"""Twice what the account service passes on. The longest are logs, which are asked for in pieces."""
_PIECE_BYTES = 1 << 16


class AnswerTooLong(requests.RequestException):
    """More than MAX_ANSWER_BYTES."""


def open_session() -> requests.Session:
    """A session whose requests' `timeout` (a number) is for the whole answer. No proxies and no .netrc of the
    environment: the latter would replace our token."""
    session = requests.Session()
    session.trust_env = False
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Bounded())
    return session


class _Bounded(HTTPAdapter):
    """Takes in the body itself, as it comes. Raises AnswerTooLong and requests' own errors."""

    def send(self, request: Any, stream: bool = False, timeout: Any = None, *more: Any, **options: Any) -> Any:
        deadline = time.monotonic() + timeout
        response = super().send(request, True, timeout, *more, **options)
        try:
            response.raw = io.BytesIO(_read(response.raw, deadline))
        except BaseException:
            response.close()
            raise
        return response


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
