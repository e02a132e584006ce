"""Sign people in with an OpenID Connect provider: authorization code, PKCE, state and nonce."""

import hmac
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from aiohttp import web
from authlib.integrations.base_client.errors import OAuthError
from authlib.integrations.requests_client import OAuth2Session
from joserfc import jwt
from joserfc.errors import BadSignatureError, InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet

from worker.account.mail import normalized
from worker.account.request_bodies import Refused
from worker.account.sessions import SignIn
from worker.account.site import Site
from worker.errors import SettingsError, WorkerError
from worker.log import discreet
from worker.runtime.files import read_secret
from worker.settings import Account as Section

_SCOPE = "openid email"
_SECONDS = 10.0
_FAILURE_SECONDS = 10.0
"""Seconds for which the configuration of a provider that has failed is not read again."""
_CONFIGURATION_SECONDS = 3600.0
_NEW_KEYS_SECONDS = 60.0
"""Seconds between two readings of the provider's keys because of an unknown key."""
_LEEWAY_SECONDS = 60
# Accepted signatures of providers: never `none`, nor one with a shared secret.
_ALGORITHMS = ("RS256", "PS256", "ES256", "EdDSA", "Ed25519", "RS384", "RS512", "ES384", "ES512")
_CALLBACK = "/sign-in/openid/callback"


class ProviderFailed(WorkerError):
    """The provider does not answer, or its answer violates OpenID Connect."""


@dataclass(frozen=True, slots=True)
class _Configuration:
    """A provider's configuration and keys, as of `read_at` (time.monotonic)."""

    content: dict[str, Any]
    keys: KeySet
    read_at: float


class OpenId:
    """`/sign-in/openid` and its callback."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._provider = Provider(site.settings)

    def add_to(self, application: web.Application) -> None:
        application.router.add_post("/sign-in/openid", self._site.handler(self.begin))
        application.router.add_get(_CALLBACK, self._site.handler(self.callback))

    async def begin(self, request: web.Request) -> web.Response:
        """Send the browser to the provider.

        The answer is a page that reloads to the provider's address, not a redirect, because
        browsers apply our policy for forms (own pages only) to redirects too.
        """
        site = self._site
        site.require_private(request)
        form = await site.form(request)
        data = await site.asked(request, form)
        await site.count_begun(request)
        place, kept = await site.outside(
            self._provider.authorization, site.address(request) + _CALLBACK
        )
        cookie = await site.in_thread(site.sessions.begin, {**data, **kept})
        name = site.settings.oidc_name
        response = site.page(request, "leaving.html", provider_name=name, provider=place)
        response.headers["Refresh"] = f"0; url={place}"
        site.begin(request, response, cookie)
        return response

    async def callback(self, request: web.Request) -> web.Response:
        """Sign in the person whom the provider sends back."""
        site = self._site
        site.require_private(request)
        sign_in = await site.in_thread(site.sessions.sign_in, site.sign_in_cookie(request))
        state = sign_in.data.get("state")
        shown = request.query.get("state", "")
        if state is None or not hmac.compare_digest(state.encode(), shown.encode()):
            raise Refused(
                400, "StateWrong", "this answer of the provider belongs to another sign-in"
            )
        await site.in_thread(site.sessions.complete, sign_in)
        if "error" in request.query:
            raise Refused(403, "ProviderRefused", "the provider did not sign you in; try again")
        email = await site.outside(
            self._provider.email,
            sign_in,
            request.query.get("code", ""),
            site.address(request) + _CALLBACK,
        )
        account = await site.in_thread(site.account_for, email, sign_in.data.get("invitation"))
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
        self._configuration: _Configuration | None = None
        self._failed_at, self._failure = float("-inf"), ""

    def authorization(self, callback: str) -> tuple[str, dict[str, str]]:
        """Return the provider's URL for the browser, and the data that the sign-in must keep."""
        configuration = self._configured().content
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
        configuration = self._configured().content
        try:
            with self._session(callback) as session:
                answer = session.fetch_token(
                    configuration["token_endpoint"],
                    code=code,
                    code_verifier=sign_in.data["verifier"],
                    timeout=_SECONDS,
                )
            claims = self._claims(str(answer.get("id_token", "")), sign_in.data["nonce"])
            has_both = {"email", "email_verified"} <= claims.keys()
            if not has_both and "userinfo_endpoint" in configuration:
                claims = _user_info(
                    configuration["userinfo_endpoint"], answer["access_token"], claims["sub"]
                )
        except OAuthError as error:
            reason = discreet(str(error.error))
            raise Refused(403, "ProviderRefused", f"the provider refused: {reason}") from None
        except (requests.RequestException, ValueError, KeyError) as error:
            raise ProviderFailed(
                f"{self._issuer} (account.oidc_issuer): {type(error).__name__}; expected an"
                " OpenID Connect provider that answers"
            ) from None
        return _verified_email(claims)

    def _claims(
        self,
        id_token: str,
        nonce: str,
    ) -> dict[str, Any]:
        """Return the claims of a valid identity token. Raises Refused."""
        expected = jwt.JWTClaimsRegistry(
            leeway=_LEEWAY_SECONDS,
            iss={"essential": True, "value": self._configured().content["issuer"]},
            aud={"essential": True, "value": self._client_id},
            exp={"essential": True},
            iat={"essential": True},
            sub={"essential": True},
            nonce={"essential": True, "value": nonce},
        )
        try:
            token = self._decoded(id_token)
            expected.validate(token.claims)
        except JoseError as error:
            raise Refused(
                403, "IdentityTokenInvalid", f"the provider's token is not valid: {error.error}"
            ) from None
        claims: dict[str, Any] = token.claims
        if claims.get("azp", self._client_id) != self._client_id:
            raise Refused(403, "IdentityTokenInvalid", "the provider's token is for another client")
        return claims

    def _decoded(self, id_token: str) -> jwt.Token:
        """Return the token if a key of the provider signed it; unknown keys are read again."""
        try:
            return jwt.decode(id_token, self._configured().keys, algorithms=list(_ALGORITHMS))
        except (InvalidKeyIdError, BadSignatureError):
            keys = self._configured(_NEW_KEYS_SECONDS).keys
            return jwt.decode(id_token, keys, algorithms=list(_ALGORITHMS))

    def _configured(self, max_age_seconds: float = _CONFIGURATION_SECONDS) -> _Configuration:
        """Return the provider's configuration, read again if it is older than `max_age_seconds`."""
        with self._lock:
            known = self._configuration
            if known is not None and time.monotonic() - known.read_at < max_age_seconds:
                return known
            if time.monotonic() - self._failed_at < _FAILURE_SECONDS:
                raise ProviderFailed(self._failure)
            try:
                self._configuration = self._read_configuration()
            except ProviderFailed as error:
                self._failed_at, self._failure = time.monotonic(), str(error)
                raise
            return self._configuration

    def _read_configuration(self) -> _Configuration:
        try:
            found = _read(f"{self._issuer}/.well-known/openid-configuration")
            if str(found["issuer"]).rstrip("/") != self._issuer:
                raise ValueError("another issuer")
            keys = KeySet.import_key_set(_read(found["jwks_uri"]))
        except (requests.RequestException, ValueError, KeyError, JoseError) as error:
            raise ProviderFailed(
                f"{self._issuer} (account.oidc_issuer): {type(error).__name__}: no OpenID Connect"
                " configuration; expected it at /.well-known/openid-configuration"
            ) from None
        return _Configuration(found, keys, time.monotonic())

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


def _user_info(
    endpoint: str,
    access_token: str,
    subject: str,
) -> dict[str, Any]:
    """Return the provider's claims about `subject`. Raises Refused if they are about another."""
    claims: dict[str, Any] = _read(endpoint, {"Authorization": f"Bearer {access_token}"})
    if claims.get("sub") != subject:
        raise Refused(403, "IdentityTokenInvalid", "the provider answered about another person")
    return claims


def _verified_email(claims: dict[str, Any]) -> str:
    if "email" not in claims:
        raise Refused(
            403,
            "EmailMissing",
            "the provider names no e-mail address of yours; allow it there to name one, or sign in"
            " with a code by e-mail",
        )
    if claims.get("email_verified") is not True:
        raise Refused(
            403,
            "EmailNotVerified",
            "the provider has not verified your e-mail address; verify it there, or sign in with a"
            " code by e-mail",
        )
    return normalized(str(claims["email"]))


def _read(
    url: str,
    headers: dict[str, str] | None = None,
) -> Any:
    """Return the JSON object at a URL. Raises RequestException, ValueError."""
    answer = requests.get(url, headers=headers, timeout=_SECONDS, allow_redirects=False)
    answer.raise_for_status()
    content = answer.json()
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content
