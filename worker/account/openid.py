"""Signing in by an OpenID Connect provider: authorization code, with PKCE, state and nonce."""

import hmac
import secrets
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import requests
from aiohttp import web
from authlib.integrations.base_client.errors import OAuthError
from authlib.integrations.requests_client import OAuth2Session
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from worker.account.mail import normalized
from worker.account.request_bodies import Refused
from worker.account.sessions import SignIn
from worker.account.site import Site, see
from worker.errors import SettingsError, WorkerError
from worker.log import discreet
from worker.runtime.files import read_secret
from worker.settings import Account as Section

_SCOPE = "openid email"
_SECONDS = 10.0
_CONFIGURATION_SECONDS = 3600.0
_LEEWAY_SECONDS = 60
# What providers sign with. Never `none`, nor a secret that the provider shares with others.
_ALGORITHMS = ("RS256", "PS256", "ES256", "EdDSA", "Ed25519", "RS384", "RS512", "ES384", "ES512")
_CALLBACK = "/sign-in/openid/callback"


class ProviderFailed(WorkerError):
    """The provider does not answer, or not as OpenID Connect says."""


class OpenId:
    """`/sign-in/openid` and its callback."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._provider = Provider(site.settings)

    def add_to(self, application: web.Application) -> None:
        application.router.add_get("/sign-in/openid", self._site.handler(self.begin))
        application.router.add_get(_CALLBACK, self._site.handler(self.callback))

    async def begin(self, request: web.Request) -> web.Response:
        """Send the browser to the provider."""
        site = self._site
        site.require_private(request)
        site.count_begun(request)
        place, kept = await site.in_thread(
            self._provider.authorization, site.address(request) + _CALLBACK
        )
        data = {
            **kept,
            "next": request.query.get("next", "")[:20],
            "code": request.query.get("code", "")[:20],
        }
        cookie = await site.in_thread(site.sessions.begin, data)
        response = see(place)
        site.begin(request, response, cookie)
        return response

    async def callback(self, request: web.Request) -> web.Response:
        """Let the person in whom the provider sends back."""
        site = self._site
        site.require_private(request)
        sign_in = await site.in_thread(site.sessions.sign_in, site.sign_in_cookie(request))
        state = sign_in.data.get("state")
        shown = request.query.get("state", "")
        if state is None or not hmac.compare_digest(state.encode(), shown.encode()):
            raise Refused(400, "StateWrong", "this answer of the provider is of another sign-in")
        await site.in_thread(site.sessions.complete, sign_in)
        if "error" in request.query:
            raise Refused(403, "ProviderRefused", "the provider did not sign you in; try again")
        email = await site.in_thread(
            self._provider.email,
            sign_in,
            request.query.get("code", ""),
            site.address(request) + _CALLBACK,
        )
        account = await site.in_thread(site.account_for, email, None)
        return await site.let_in(request, account, sign_in.data, "openid", email)


class Provider:
    """The provider of the settings; its configuration is read when it is needed. Thread-safe."""

    def __init__(self, section: Section) -> None:
        self._issuer = str(section.oidc_issuer).rstrip("/")
        self._client_id = section.oidc_client_id or ""
        self._secret: str | None = None
        if section.oidc_client_secret_file is not None:
            self._secret = read_secret(
                section.oidc_client_secret_file,
                "one word, the client secret that the provider gave",
                "account.oidc_client_secret_file",
            )
        place = urlsplit(self._issuer)
        if place.scheme != "https" and place.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise SettingsError(
                f"account.oidc_issuer: got {self._issuer}; expected an https:// address"
            )
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._configuration: dict[str, Any] = {}
        self._keys: Any = None

    def authorization(self, callback: str) -> tuple[str, dict[str, str]]:
        """Return where the browser goes, and what the sign-in keeps until it comes back."""
        configuration = self._configured()
        verifier, nonce = secrets.token_urlsafe(48), secrets.token_urlsafe(24)
        with self._session(callback) as session:
            place, state = session.create_authorization_url(
                configuration["authorization_endpoint"], code_verifier=verifier, nonce=nonce
            )
        return str(place), {"state": str(state), "nonce": nonce, "verifier": verifier}

    def email(
        self,
        sign_in: SignIn,
        code: str,
        callback: str,
    ) -> str:
        """Return the verified e-mail address of the person with this authorization code.

        Raises Refused if the provider does not vouch for one, ProviderFailed.
        """
        configuration = self._configured()
        try:
            with self._session(callback) as session:
                answer = session.fetch_token(
                    configuration["token_endpoint"],
                    code=code,
                    code_verifier=sign_in.data["verifier"],
                    timeout=_SECONDS,
                )
            claims = self._claims(str(answer.get("id_token", "")), sign_in.data["nonce"])
        except OAuthError as error:
            reason = discreet(str(error.error))
            raise Refused(403, "ProviderRefused", f"the provider refused: {reason}") from None
        except (requests.RequestException, ValueError, KeyError) as error:
            raise ProviderFailed(
                f"{self._issuer} (account.oidc_issuer): {type(error).__name__}; expected an"
                " OpenID Connect provider that answers"
            ) from None
        if claims.get("email_verified") is not True:
            raise Refused(
                403,
                "EmailNotVerified",
                "the provider has not verified your e-mail address; verify it there, or sign in"
                " with a code by e-mail",
            )
        return normalized(str(claims.get("email", "")))

    def _claims(
        self,
        id_token: str,
        nonce: str,
    ) -> dict[str, Any]:
        """Return the claims of a valid identity token. Raises Refused."""
        expected = jwt.JWTClaimsRegistry(
            leeway=_LEEWAY_SECONDS,
            iss={"essential": True, "value": self._configuration["issuer"]},
            aud={"essential": True, "value": self._client_id},
            exp={"essential": True},
            iat={"essential": True},
            sub={"essential": True},
            nonce={"essential": True, "value": nonce},
        )
        try:
            token = jwt.decode(id_token, self._keys, algorithms=list(_ALGORITHMS))
            expected.validate(token.claims)
        except JoseError as error:
            raise Refused(
                403, "IdentityTokenInvalid", f"the provider's token is not valid: {error.error}"
            ) from None
        claims: dict[str, Any] = token.claims
        if claims.get("azp", self._client_id) != self._client_id:
            raise Refused(403, "IdentityTokenInvalid", "the provider's token is for another client")
        return claims

    def _configured(self) -> dict[str, Any]:
        """Return the provider's configuration, read with its keys at most once an hour."""
        with self._lock:
            if time.monotonic() - self._read_at < _CONFIGURATION_SECONDS:
                return self._configuration
            try:
                found: dict[str, Any] = self._read(
                    f"{self._issuer}/.well-known/openid-configuration"
                )
                if str(found["issuer"]).rstrip("/") != self._issuer:
                    raise ValueError("another issuer")
                keys = KeySet.import_key_set(self._read(found["jwks_uri"]))
            except (requests.RequestException, ValueError, KeyError, JoseError) as error:
                raise ProviderFailed(
                    f"{self._issuer} (account.oidc_issuer): {type(error).__name__}: no OpenID"
                    " Connect configuration; expected it at /.well-known/openid-configuration"
                ) from None
            self._configuration, self._keys = found, keys
            self._read_at = time.monotonic()
            return found

    def _read(self, url: str) -> Any:
        answer = requests.get(url, timeout=_SECONDS, allow_redirects=False)
        answer.raise_for_status()
        return answer.json()

    def _session(self, callback: str) -> OAuth2Session:
        method = "none" if self._secret is None else "client_secret_basic"
        return OAuth2Session(
            self._client_id,
            self._secret,
            scope=_SCOPE,
            redirect_uri=callback,
            code_challenge_method="S256",
            token_endpoint_auth_method=method,
        )
