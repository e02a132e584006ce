"""Sign people in by e-mail with a code, or by the headers of `tailscale serve`; sign them out."""

from aiohttp import web

from worker.account.lockouts import Guess
from worker.account.mail import Mailer, MailRefused, normalized
from worker.account.request_bodies import Refused
from worker.account.sessions import HOST_CODE_LETTERS, new_code, plain
from worker.account.site import Form, Site, Visitor, see, text_of
from worker.account.socket_owner import owner_of
from worker.chain.quotas import Quota
from worker.errors import WorkerError
from worker.log import printable
from worker.runtime import webguard

_MAILS_PER_SECOND, _MAILS_BURST = 10 / 3600, 5.0
"""Number of codes that one address can request for an e-mail address."""
_MAILS_OF_ALL_PER_SECOND, _MAILS_OF_ALL_BURST = 60 / 3600, 60.0
"""Number of codes sent to one e-mail address, for all requests together. Browsers that have signed
in with it before have only the limit of their address, so others can't lock the owner out."""
_LOGIN, _ROOT = "Tailscale-User-Login", 0


class SignInPages:
    """`/sign-in` and the pages below it."""

    def __init__(
        self,
        site: Site,
        has_openid: bool,
        has_passkeys: bool,
    ) -> None:
        self._site = site
        self._has_openid = has_openid
        self._has_passkeys = has_passkeys
        section = site.settings
        self._mailer = None if section.smtp_host is None else Mailer(section)
        self._mails = Quota(_MAILS_PER_SECOND, _MAILS_BURST)
        self._mails_of_all = Quota(_MAILS_OF_ALL_PER_SECOND, _MAILS_OF_ALL_BURST)

    def add_to(self, application: web.Application) -> None:
        site, router = self._site, application.router
        router.add_get("/sign-in", site.handler(self.show))
        router.add_post("/sign-in/email", site.handler(self.email))
        router.add_get("/sign-in/code", site.handler(self.show_code))
        router.add_post("/sign-in/code", site.handler(self.code))
        router.add_post("/sign-in/tailscale", site.handler(self.tailscale))
        router.add_post("/sign-out", site.signed_in(self.sign_out, is_post=True))

    async def show(self, request: web.Request) -> web.Response:
        site = self._site
        site.require_private(request)
        return site.page(
            request,
            "sign_in.html",
            following=request.query.get("next", ""),
            code=request.query.get("code", "")[:20],
            tailscale_login=self._tailscale_login(request),
            openid_name=site.settings.oidc_name if self._has_openid else None,
            has_passkeys=self._has_passkeys,
            needs_invitation=site.settings.sign_up == "invitation",
        )

    async def email(self, request: web.Request) -> web.Response:
        site = self._site
        site.require_private(request)
        form = await site.form(request)
        email = normalized(text_of(form, "email"))
        data = await site.asked(request, form)
        await site.count_begun(request)
        code = None
        if self._mailer is not None:
            code = new_code()
            await self._send(request, self._mailer, email, code)
        cookie = await site.in_thread(site.sessions.begin, data, email, code)
        response = see("/sign-in/code")
        site.begin(request, response, cookie)
        return response

    async def show_code(self, request: web.Request) -> web.Response:
        sign_in = await self._site.in_thread(
            self._site.sessions.sign_in, self._site.sign_in_cookie(request)
        )
        return self._site.page(
            request, "code.html", email=sign_in.email, is_mailed=self._mailer is not None, wrong=""
        )

    async def code(self, request: web.Request) -> web.Response:
        site = self._site
        form = await site.form(request)
        sign_in = await site.in_thread(site.sessions.sign_in, site.sign_in_cookie(request))
        code = text_of(form, "code", 40)
        if sign_in.email is None:
            raise Refused(400, "SignInOver", "this sign-in has no code; begin it again")
        guess = await self._count_code(request, sign_in.email, code)
        try:
            is_right = await site.in_thread(site.sessions.guess, sign_in, code)
        except Refused:
            guess.take_back()  # the sign-in has no guesses left, so the code was not compared
            raise
        if not is_right:
            return site.page(
                request,
                "code.html",
                status=403,
                email=sign_in.email,
                is_mailed=self._mailer is not None,
                wrong="That is not the code.",
            )
        guess.take_back()
        await site.in_thread(site.sessions.complete, sign_in)
        account = await site.in_thread(
            site.account_for, sign_in.email, sign_in.data.get("invitation")
        )
        return await site.let_in(request, account, sign_in.data, "email", sign_in.email)

    async def tailscale(self, request: web.Request) -> web.Response:
        site = self._site
        site.require_private(request)
        form = await site.form(request)
        login = self._tailscale_login(request)
        if login is None:
            raise Refused(403, "TailscaleMissing", "this request did not come by `tailscale serve`")
        await site.count_begun(request)
        data = await site.asked(request, form)
        account = await site.in_thread(site.account_for, login, data.get("invitation"))
        return await site.let_in(request, account, data, "tailscale", login)

    async def sign_out(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        if form.get("everywhere"):
            await self._site.in_thread(self._site.sessions.end_all, visitor.account.id)
        else:
            await self._site.in_thread(self._site.sessions.end, visitor.session)
        return self._site.sign_out(request)

    async def _count_code(
        self,
        request: web.Request,
        email: str,
        code: str,
    ) -> Guess:
        """Count a code as a guess; the host's codes are too long to guess."""
        site = self._site
        account = await site.in_thread(site.find_account, email)
        known = await site.known_browser(request, account)
        is_hosts = len(plain(code)) == HOST_CODE_LETTERS
        return site.lockouts.count(
            site.source(request), None if is_hosts else f"code {email}", known
        )

    async def _send(
        self,
        request: web.Request,
        mailer: Mailer,
        email: str,
        code: str,
    ) -> None:
        site = self._site
        known = await site.known_browser(request, await site.in_thread(site.find_account, email))
        is_allowed = self._mails.take(f"{email} {known or site.source(request)}")
        if not is_allowed or not (known or self._mails_of_all.take(email)):
            raise Refused(
                429,
                "TooManyMails",
                f"{email} was sent many codes; wait, sign in another way, or ask the host for a"
                " code",
            )
        try:
            await site.outside(mailer.send_code, email, code)
        except MailRefused as error:
            raise WorkerError(f"the code could not be sent: {error}") from None

    def _tailscale_login(self, request: web.Request) -> str | None:
        """Return the e-mail that `tailscale serve` names, if it made this connection.

        Other processes of this machine can send the header too, but do not run as root.
        """
        login = request.headers.get(_LOGIN)
        is_tailscale = self._site.settings.tailscale_login and login is not None
        if not is_tailscale or not webguard.is_loopback(str(request.remote)):
            return None
        if request.transport is None:
            return None  # the client has left
        peer, own = (request.transport.get_extra_info(end) for end in ("peername", "sockname"))
        if owner_of(peer[:2], own[:2]) != _ROOT:
            return None
        try:
            return normalized(printable(str(login)))
        except Refused:
            return None  # a tagged machine, or a name that is not an e-mail address
