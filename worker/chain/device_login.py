"""The node's side of signing in from a terminal: device authorization (RFC 8628)."""

import base64
import time
from dataclasses import dataclass
from typing import Any

from worker import settings
from worker.chain import deployment, http
from worker.chain.account_client import DEVICE_GRANT
from worker.chain.enrolment_proof import Challenge, message, purpose_of_login
from worker.errors import ChainError, ChainUnreachable, IdentityError
from worker.log import printable
from worker.swarm.identity import Identity

_MAX_POLL_SECONDS = 60.0
_AWAY = (502, 503, 504)
"""HTTP statuses of a proxy while the service behind it is down."""
_SLOWER_SECONDS = 5.0
"""Seconds added to the interval after the answer slow_down (RFC 8628, 3.5)."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A sign-in that waits for a person. Times are in seconds."""

    device_code: str
    user_code: str
    page: str
    page_with_code: str
    expires_in: float
    interval: float


class DeviceLogin:
    """A sign-in at the account service at `url`.

    Every method may raise ChainUnreachable, and ChainError for an unexpected answer.
    """

    def __init__(
        self,
        url: str,
        chain: settings.Chain,
    ) -> None:
        self._url = url.rstrip("/")
        self._timeout_seconds = chain.timeout_seconds
        self._session = http.open_session()

    def close(self) -> None:
        self._session.close()

    def begin(
        self,
        identity: Identity,
        name: str,
        move: bool,
        challenge: Challenge | None,
    ) -> Begun:
        """Ask for a code, with a proof of the node's key."""
        signature = identity.sign(message(identity.peer_id, purpose_of_login(move), challenge))
        status, answer = self._post(
            "/oauth/device_authorization",
            {
                "client_id": "hivewright",
                "peer_id": identity.peer_id,
                "public_key": base64.b64encode(identity.public_key).decode(),
                "signature": base64.b64encode(signature).decode(),
                "name": name,
                "move": "yes" if move else "no",
                "challenge": "" if challenge is None else challenge.text,
            },
        )
        if status != 200:
            raise self._failure(answer)
        try:
            return Begun(
                device_code=str(answer["device_code"]),
                user_code=printable(str(answer["user_code"])),
                page=printable(str(answer["verification_uri"])),
                page_with_code=printable(str(answer["verification_uri_complete"])),
                expires_in=float(answer["expires_in"]),
                interval=float(answer.get("interval", _SLOWER_SECONDS)),
            )
        except (KeyError, ValueError, TypeError):
            raise ChainError(
                f"{self._url}: no code in the answer; expected hivewright's account service, with"
                " account.passphrase_file set"
            ) from None

    def wait(self, begun: Begun) -> str:
        """Return the node's token when a person has allowed the node.

        Continues to ask while the service is down, for example for an upgrade. Raises IdentityError
        if the person refuses, the account can't have the node, or the code is not typed in time;
        ChainUnreachable if the service is down at the end of that time.
        """
        interval = min(begun.interval, _MAX_POLL_SECONDS)
        deadline = time.monotonic() + begun.expires_in
        body = {"grant_type": DEVICE_GRANT, "device_code": begun.device_code}
        outage: ChainUnreachable | None = None
        while time.monotonic() < deadline:
            time.sleep(interval)
            try:
                status, answer = self._post("/oauth/token", {**body, "client_id": "hivewright"})
            except ChainUnreachable as error:
                outage = error
                continue
            outage = None
            if status == 200 and isinstance(answer.get("access_token"), str):
                return str(answer["access_token"])
            if answer.get("error") == "slow_down":
                interval += _SLOWER_SECONDS
            elif answer.get("error") != "authorization_pending":
                raise self._failure(answer)
        if outage is not None:
            raise outage
        raise IdentityError(
            f"{self._url}: nobody typed {begun.user_code} within {begun.expires_in:g} s; run"
            " `hivewright login` again"
        )

    def _failure(
        self,
        answer: dict[str, Any],
    ) -> IdentityError:
        said = answer.get("error_description") or answer.get("error") or "no sign-in here"
        return IdentityError(f"{self._url}: sign-in refused: {printable(str(said))[:400]}")

    def _post(
        self,
        path: str,
        form: dict[str, str],
    ) -> tuple[int, dict[str, Any]]:
        with deployment.translated(self._url, self._timeout_seconds):
            answer = self._session.post(
                self._url + path, data=form, timeout=self._timeout_seconds, allow_redirects=False
            )
        if answer.status_code in _AWAY:
            raise ChainUnreachable(f"{self._url}{path}: HTTP {answer.status_code}; try again later")
        try:
            content = answer.json()
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise ChainError(
                f"{self._url}{path}: HTTP {answer.status_code} without JSON; expected hivewright's"
                " account service"
            )
        return answer.status_code, content
