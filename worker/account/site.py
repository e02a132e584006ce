"""The common part of the pages: templates, sessions, forms, and errors as pages.

Pages need no JavaScript, and nothing from other servers. Every form has the session's token and
must come from a page of ours.
"""

import asyncio
import functools
import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler
from multidict import MultiDictProxy

from worker.account.accounts import Account, Accounts, digest
from worker.account.invitations import Invitations
from worker.account.key_proofs import KeyProofs
from worker.account.lockouts import Lockouts
from worker.account.queues import Queues
from worker.account.request_bodies import Refused
from worker.account.sessions import (
    KNOWN_SECONDS,
    SESSION_SECONDS,
    SIGN_IN_SECONDS,
    Session,
    Sessions,
)
from worker.chain.coordinator import Coordinator
from worker.chain.quotas import Quota
from worker.errors import WorkerError
from worker.market_view import rendering
from worker.market_view.market_history import History
from worker.runtime import webguard, webpages
from worker.settings import Settings

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "page"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src"
        " 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    # With no-referrer, browsers would send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
}
_SESSION, _SIGN_IN, _KNOWN = "hivewright_session", "hivewright_sign_in", "hivewright_known"
_BEGUN_PER_SECOND, _BEGUN_BURST = 1 / 30, 20.0
"""Number of sign-ins that one address may begin."""

_MAX_OUTGOING = 8
"""Number of concurrent calls to the provider and the mail server."""
_HTTPS_SECONDS = 365 * 24 * 3600

_P = ParamSpec("_P")
_Result = TypeVar("_Result")
Form = MultiDictProxy[Any]


@dataclass(frozen=True, slots=True)
class Visitor:
    """A signed-in person."""

    account: Account
    session: Session


class Site:
    """Functions that all pages use. Those that wait for disk or chain run in threads."""

    def __init__(
        self,
        settings: Settings,
        accounts: Accounts,
        queues: Queues,
        coordinator: Coordinator,
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
        source: Callable[[web.Request], str],
    ) -> None:
        self.settings = settings.account
        self.accounts = accounts
        self.queues = queues
        self.coordinator = coordinator
        self.sessions = Sessions(accounts.database)
        self.invitations = Invitations(accounts)
        self.key_proofs = KeyProofs(coordinator)
        self.source = source
        self._in_thread = in_thread
        self._outgoing = ThreadPoolExecutor(_MAX_OUTGOING, "outgoing")
        self._begun = Quota(_BEGUN_PER_SECOND, _BEGUN_BURST)
        self.lockouts = Lockouts()
        self._networks = [ipaddress.ip_network(each) for each in self.settings.trusted_networks]
        self._sparingly = webguard.Sparingly()
        self._templates = webpages.templates(_FOLDER, rendering.FOLDER)
        rendering.prepare(self._templates)
        self.market = History(settings, lambda: coordinator)
        self.has_market = settings.market.enabled is not False

    def add_to(self, application: web.Application) -> None:
        headers = {**HEADERS, "Cache-Control": "max-age=300"}
        webpages.add_files(application, _FOLDER, ("page.css", "page.js"), headers)
        webpages.add_file(application, rendering.STYLE, headers)
        application.on_response_prepare.append(self._require_https)

    async def in_thread(
        self,
        function: Callable[_P, _Result],
        *arguments: _P.args,
        **named: _P.kwargs,
    ) -> _Result:
        result: _Result = await self._in_thread(functools.partial(function, *arguments, **named))
        return result

    async def outside(
        self,
        function: Callable[_P, _Result],
        *arguments: _P.args,
        **named: _P.kwargs,
    ) -> _Result:
        """Run a call to a foreign server in one of a few threads that nodes' calls do not use."""
        call = functools.partial(function, *arguments, **named)
        return await asyncio.get_running_loop().run_in_executor(self._outgoing, call)

    def close(self) -> None:
        """End the threads; those that wait for a server end after their time limit."""
        self._outgoing.shutdown(wait=False, cancel_futures=True)

    # ---- answers

    def page(
        self,
        request: web.Request,
        template: str,
        visitor: Visitor | None = None,
        status: int = 200,
        **content: Any,
    ) -> web.Response:
        """Return a page; every text in it is escaped."""
        text = self._templates.get_template(template).render(
            account=visitor and visitor.account,
            csrf=visitor.session.csrf if visitor else "",
            is_host=visitor is not None and visitor.account.is_operator,
            has_market=self.has_market,
            dashboard_url=self.settings.dashboard_url,
            path=request.path,
            **content,
        )
        return web.Response(text=text, content_type="text/html", status=status, headers=HEADERS)

    def error(
        self,
        request: web.Request,
        status: int,
        text: str,
    ) -> web.Response:
        headers = {"Retry-After": "30"} if status == 429 else {}
        response = self.page(request, "error.html", status=status, text=text)
        response.headers.update(headers)
        return response

    def handler(self, handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Handler:
        """Return the handler of a page: it answers errors with pages."""

        @functools.wraps(handle)
        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                return await handle(request)
            except Refused as refused:
                self._sparingly.warn(
                    refused.error,
                    f"refused path={request.path} status={refused.status} {refused.error}"
                    f" from={request.remote}",
                )
                return self.error(request, refused.status, refused.detail or refused.error)
            except web.HTTPException:
                raise
            except WorkerError as error:
                self._sparingly.warn(type(error).__name__, f"page failed error={error}")
                return self.error(request, 503, f"This does not work right now: {error}")

        return answer

    def signed_in(
        self,
        handle: Callable[Concatenate[web.Request, Visitor, ...], Awaitable[web.StreamResponse]],
        is_post: bool = False,
    ) -> Handler:
        """Return the handler of a page for people who are signed in; others sign in first.

        With `is_post` it is one of our forms, whose fields are passed to the handler.
        """

        async def answer(request: web.Request) -> web.StreamResponse:
            self.require_private(request)
            visitor = await self.visitor(request)
            if visitor is None:
                return see(f"/sign-in{_following(request)}")
            if not is_post:
                return await handle(request, visitor)
            form = await self.form(request)
            shown = str(form.get("csrf", ""))
            if not hmac.compare_digest(shown.encode(), visitor.session.csrf.encode()):
                raise Refused(403, "FormOld", "this form is of another session; reload the page")
            return await handle(request, visitor, form)

        return self.handler(answer)

    # ---- requests

    async def visitor(self, request: web.Request) -> Visitor | None:
        cookie = request.cookies.get(self._cookie(request, _SESSION))
        session = None if cookie is None else await self.in_thread(self.sessions.find, cookie)
        if session is None:
            return None
        try:
            account = await self.in_thread(self.accounts.by_id, session.account_id)
        except Refused:
            return None
        if account.is_operator and not self.is_operator(session.email):
            return None  # no longer in account.operators
        return Visitor(account, session)

    def is_operator(self, email: str | None) -> bool:
        """Return whether the person with this e-mail address signs in to the operator's account."""
        return email in {each.lower() for each in self.settings.operators}

    async def form(self, request: web.Request) -> Form:
        """Return the fields of a form that one of our pages sent. Raises Refused."""
        self.require_own_page(request)
        if request.content_type != "application/x-www-form-urlencoded":
            raise Refused(415, "FormExpected", "expected a form of this page")
        return await request.post()

    def require_own_page(self, request: web.Request) -> None:
        """Refuse requests that no page of ours sent; the guard refuses pages of other sites."""
        origin = request.headers.get("Origin")
        if origin is None:
            raise Refused(403, "OriginMissing", "expected a request of this page: no Origin header")
        if self.is_https(request) and not origin.lower().startswith("https://"):
            raise Refused(
                403,
                "OriginPlain",
                "the page that sent this was loaded without HTTPS; open it with https",
            )

    def require_private(self, request: web.Request) -> None:
        """Refuse to sign people in over a connection that others can read."""
        if not (self.is_https(request) or self._is_private(request)):
            raise Refused(
                403,
                "HttpsNeeded",
                "signing in needs HTTPS, this machine, or a VPN (account.trusted_networks): others"
                " could read this connection. Open the page by its https:// address, or through"
                " `ssh -L 3000:localhost:3000 HOST` as http://localhost:3000",
            )

    def is_https(self, request: web.Request) -> bool:
        """Return whether the browser uses HTTPS, to a proxy on this machine."""
        is_forwarded = self.settings.behind_proxy and webguard.is_loopback(str(request.remote))
        return is_forwarded and request.headers.get("X-Forwarded-Proto") == "https"

    async def _require_https(
        self,
        request: web.Request,
        response: web.StreamResponse,
    ) -> None:
        """Tell browsers that use HTTPS to use it from now on, at all ports of our name (HSTS).

        Not if the dashboard has the same name without HTTPS: browsers would no longer open it.
        """
        dashboard = urlsplit(self.settings.dashboard_url or "")
        is_plain = dashboard.scheme == "http"
        if is_plain and dashboard.hostname == urlsplit(self.address(request)).hostname:
            return
        if self.is_https(request):
            response.headers["Strict-Transport-Security"] = f"max-age={_HTTPS_SECONDS}"

    def _is_private(self, request: web.Request) -> bool:
        source = self.source(request).removeprefix("forwarded ")
        if webguard.is_loopback(source):
            return True
        try:
            address = ipaddress.ip_address(str(request.remote))
            if self.settings.behind_proxy and address.is_loopback:
                forwarded = request.headers.get("X-Forwarded-For", "").rpartition(",")[2]
                address = ipaddress.ip_address(forwarded.strip())
        except ValueError:
            return False
        return any(address in network for network in self._networks)

    def address(self, request: web.Request) -> str:
        """Return the page's own address, without a slash at its end."""
        if self.settings.public_url is not None:
            return self.settings.public_url.rstrip("/")
        return f"{'https' if self.is_https(request) else 'http'}://{request.host}"

    async def count_begun(self, request: web.Request) -> None:
        """Count a sign-in, or another record that is stored for unknown callers. Raises Refused.

        Browsers that have signed in before do not share the limit of their address.
        """
        browser = await self._browser(request)
        if not self._begun.take(self.source(request) if browser is None else browser[0]):
            raise Refused(429, "TooManySignIns", "too many sign-ins from here; wait half a minute")

    async def asked(
        self,
        request: web.Request,
        form: Form,
    ) -> dict[str, str]:
        """Return data for the sign-in: the next page, and the invitation if it is valid."""
        data = {"next": text_of(form, "next", 20), "code": text_of(form, "code", 20)}
        secret = text_of(form, "invitation")
        if secret:
            browser = await self._browser(request)
            guess = self.lockouts.count(self.source(request), None, browser and browser[0])
            await self.in_thread(self.invitations.find, digest(secret))
            guess.take_back()
            data["invitation"] = digest(secret).hex()
        return data

    async def known_browser(
        self,
        request: web.Request,
        account: Account | None,
    ) -> str | None:
        """Return a name of this browser; None if it has not signed in to the account before."""
        browser = await self._browser(request)
        if account is None or browser is None or browser[1] != account.id:
            return None
        return browser[0]

    async def _browser(self, request: web.Request) -> tuple[str, int] | None:
        """Return a name of this browser and the account that it has signed in to before."""
        cookie = request.cookies.get(self._cookie(request, _KNOWN))
        if cookie is None:
            return None
        account_id = await self.in_thread(self.sessions.known_account, cookie)
        return None if account_id is None else (f"browser {digest(cookie).hex()}", account_id)

    def find_account(self, email: str) -> Account | None:
        """Return the account of an e-mail address; None: it has none yet."""
        return self.accounts.operator if self.is_operator(email) else self.accounts.by_email(email)

    # ---- cookies

    def _cookie(
        self,
        request: web.Request,
        name: str,
    ) -> str:
        return f"__Host-{name}" if self.is_https(request) else name

    def set_cookie(
        self,
        request: web.Request,
        response: web.StreamResponse,
        name: str,
        value: str,
        seconds: float,
    ) -> None:
        """Set a cookie for this server alone.

        It is `Secure`, except on a VPN without HTTPS, where browsers would not send it back.
        """
        response.set_cookie(
            self._cookie(request, name),
            value,
            max_age=int(seconds),
            httponly=True,
            secure=self._is_secure(request),
            samesite="Lax",
            path="/",
        )

    def _end_cookie(
        self,
        request: web.Request,
        response: web.StreamResponse,
        name: str,
    ) -> None:
        """Delete a cookie, with the attributes that it was set with; others would be ignored."""
        response.del_cookie(
            self._cookie(request, name),
            httponly=True,
            secure=self._is_secure(request),
            samesite="Lax",
            path="/",
        )

    def _is_secure(self, request: web.Request) -> bool:
        source = self.source(request).removeprefix("forwarded ")
        return self.is_https(request) or webguard.is_loopback(source)

    def sign_in_cookie(self, request: web.Request) -> str:
        return request.cookies.get(self._cookie(request, _SIGN_IN), "")

    def begin(
        self,
        request: web.Request,
        response: web.StreamResponse,
        cookie: str,
    ) -> None:
        """Let the browser keep the sign-in that it began."""
        self.set_cookie(request, response, _SIGN_IN, cookie, SIGN_IN_SECONDS)

    async def let_in(
        self,
        request: web.Request,
        account: Account,
        data: dict[str, Any],
        way: str,
        email: str,
    ) -> web.Response:
        """Start a new session, and send the browser to the page that it asked for."""
        former = await self.visitor(request)
        if former is not None:
            await self.in_thread(self.sessions.end, former.session)
        cookie = await self.in_thread(self.sessions.start, account.id, email)
        log.info("signed in account=%s way=%s", account.address, way)
        places = {"device": "/device", "key": "/settings"}
        place = places.get(str(data.get("next")), "/")
        if place == "/device" and data.get("code"):
            place += f"?code={quote(str(data['code']), safe='')}"
        response = web.Response(status=303, headers={"Location": place})
        self.set_cookie(request, response, _SESSION, cookie, SESSION_SECONDS)
        if await self.known_browser(request, account) is None:
            known = await self.in_thread(self.sessions.know, account.id)
            self.set_cookie(request, response, _KNOWN, known, KNOWN_SECONDS)
        self._end_cookie(request, response, _SIGN_IN)
        return response

    def sign_out(self, request: web.Request) -> web.Response:
        response = web.Response(status=303, headers={"Location": "/sign-in"})
        self._end_cookie(request, response, _SESSION)
        return response

    def account_for(
        self,
        email: str,
        invitation: str | None,
    ) -> Account:
        """Return the account of a verified e-mail address, which is created at the first sign-in.

        `invitation`: hexadecimal hash of the invitation's secret. Raises Refused.
        """
        if self.is_operator(email):
            return self.accounts.operator
        if invitation:
            return self.invitations.accept(bytes.fromhex(invitation), email)
        account = self.accounts.by_email(email)
        if account is not None:
            return account
        if self.settings.sign_up == "invitation":
            raise Refused(
                403,
                "InvitationNeeded",
                f"{email} has no account here yet, and a new one needs an invitation of the host",
            )
        return self.accounts.create(email, self.settings.max_nodes)


def see(place: str) -> web.Response:
    """Return the answer to a form: a redirect to one of our pages."""
    return web.Response(status=303, headers={"Location": place})


def _following(request: web.Request) -> str:
    """Return the query with which the sign-in page leads back to this page and its code."""
    if request.path != "/device":
        return ""
    kept = {"next": "device", "code": request.query.get("code", "")[:20]}
    return f"?{urlencode(kept)}"


def text_of(
    form: Form,
    name: str,
    most: int = 200,
) -> str:
    """Return a field of a form. Raises Refused if it is too long or can't be shown."""
    text = str(form.get(name, "")).strip()
    if len(text) > most or not text.isprintable():
        raise Refused(400, "FieldInvalid", f"{name}: expected at most {most} printable characters")
    return text
