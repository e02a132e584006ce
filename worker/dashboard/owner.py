"""Let the owner sign in, from a browser on this machine and with a token, to private pages.

The token is in `<dashboard.state_dir>/owner.token`, which is made at the first start. `ssh -L` and
`tailscale serve` reach the dashboard from this machine, so the token is needed there, too. A
browser keeps a session, which ends when the token is replaced and the dashboard started again.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from aiohttp import web

from worker.errors import ResourceError
from worker.runtime import webguard

FILE = "owner.token"
_COOKIE = "hivewright_owner"
_SESSION_SECONDS = 14 * 24 * 3600


class Owner:
    """The owner of the dashboard whose state is in `folder`.

    Raises ResourceError if the token can't be read or made.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        try:
            with open(os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
                new.write(secrets.token_urlsafe(32) + "\n")
        except FileExistsError:
            pass
        except OSError as error:
            raise ResourceError(f"{self.file}: can't be made: {error.strerror}") from None
        self._token = self._read()
        self._session = hashlib.sha256(f"session/{self._token}".encode()).hexdigest()

    def is_at(self, request: web.Request) -> bool:
        """Return whether the request is the owner's."""
        shown = request.cookies.get(_COOKIE, "")
        return self.can_be_at(request) and hmac.compare_digest(
            shown.encode(), self._session.encode()
        )

    def can_be_at(self, request: web.Request) -> bool:
        """Return whether the owner may sign in over this connection: nobody else can read it."""
        return webguard.is_loopback(str(request.remote))

    def sign_in(self, request: web.Request, token: str) -> web.Response | None:
        """Return the answer that starts a session; None: the token is wrong."""
        if not self.can_be_at(request):
            return None
        if not hmac.compare_digest(token.strip().encode(), self._token.encode()):
            return None
        response = web.Response(status=303, headers={"Location": "/"})
        response.set_cookie(
            _COOKIE,
            self._session,
            max_age=_SESSION_SECONDS,
            httponly=True,
            secure=True,  # browsers treat this machine as secure
            samesite="Strict",
            path="/",
        )
        return response

    def _read(self) -> str:
        try:
            token = self.file.read_text().strip()
        except (OSError, UnicodeError) as error:
            raise ResourceError(f"{self.file}: can't be read: {error}") from None
        if len(token) < 32:
            raise ResourceError(
                f"{self.file}: has {len(token)} characters; expected at least 32; remove it and"
                " start the dashboard again"
            )
        return token
