"""Sign a node in from a terminal: device authorization (RFC 8628), and the page that allows it.

The node proves its key with the request. Its token belongs to the account of the person who types
the code.
"""

import base64
import secrets
import time
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from worker.account.accounts import Account, digest, peer_taken
from worker.account.request_bodies import PEER_ID, Refused
from worker.account.sessions import LETTERS
from worker.account.site import Form, Site, Visitor, text_of
from worker.chain.account_client import DEVICE_GRANT
from worker.chain.enrolment_proof import purpose_of_login
from worker.chain.quotas import Quota
from worker.errors import ChainError
from worker.swarm import identity

_SECONDS = 900
_POLL_SECONDS = 5
_MOST_OPEN = 1000
_FIELD_BYTES = 8192
_OVER = "expired_token"
_WRONG_PER_SECOND, _WRONG_BURST = 1 / 6, 20.0
"""Limit of wrong codes from one address."""


class DeviceFlow:
    """`/oauth/device_authorization`, `/oauth/token`, and `/device` for people."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._database = site.accounts.database
        self._wrong_codes = Quota(_WRONG_PER_SECOND, _WRONG_BURST)

    def add_to(self, application: web.Application) -> None:
        site, router = self._site, application.router
        router.add_post("/oauth/device_authorization", self._answering(self.ask))
        router.add_post("/oauth/token", self._answering(self.token))
        router.add_get("/device", site.signed_in(self.show))
        router.add_post("/device", site.signed_in(self.confirm, is_post=True))
        router.add_post("/device/allow", site.signed_in(self.allow, is_post=True))

    # ---- for nodes

    def _answering(
        self, handle: Callable[[web.Request, Form], Awaitable[dict[str, object]]]
    ) -> Handler:
        """Return a handler that answers refusals in the form of OAuth."""

        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                form = await request.post()
                answer = await handle(request, form)
            except Refused as refused:
                content = {"error": refused.error, "error_description": refused.detail or ""}
                return web.json_response(content, status=refused.status)
            return web.json_response(answer)

        return answer

    async def ask(
        self,
        request: web.Request,
        form: Form,
    ) -> dict[str, object]:
        """Begin a sign-in: the node gets a code for itself, and one for a person to type."""
        await self._site.count_begun(request)
        peer_id = _field(form, "peer_id")
        if not PEER_ID.fullmatch(peer_id):
            raise Refused(400, "invalid_request", "peer_id: expected a peer id")
        try:
            public_key = base64.b64decode(_field(form, "public_key"), validate=True)
            signature = base64.b64decode(_field(form, "signature"), validate=True)
        except ValueError:
            raise Refused(
                400, "invalid_request", "public_key, signature: expected base 64"
            ) from None
        name = _field(form, "name")[:40]
        is_move = _field(form, "move") == "yes"
        try:
            await self._site.in_thread(
                self._site.key_proofs.require,
                peer_id,
                public_key,
                signature,
                purpose_of_login(is_move),
                _field(form, "challenge"),
            )
        except Refused as refused:
            raise Refused(403, "access_denied", refused.detail) from None
        device_code, user_code = await self._site.in_thread(
            self._begin, peer_id, name if name.isprintable() else "", is_move
        )
        address = self._site.address(request)
        return {
            "device_code": device_code,
            "user_code": user_code,
            "verification_uri": f"{address}/device",
            "verification_uri_complete": f"{address}/device?code={user_code}",
            "expires_in": _SECONDS,
            "interval": _POLL_SECONDS,
        }

    def _begin(
        self,
        peer_id: str,
        name: str,
        is_move: bool,
    ) -> tuple[str, str]:
        """Store a new sign-in of the node, which replaces an earlier one."""
        self._site.sessions.forget_old()
        device_code = secrets.token_urlsafe(32)
        letters = "".join(secrets.choice(LETTERS) for _ in range(8))
        user_code = f"{letters[:4]}-{letters[4:]}"
        row = (digest(device_code), user_code, peer_id, name, int(is_move), time.time() + _SECONDS)
        with self._database.transaction() as run:
            run("DELETE FROM devices WHERE peer_id = ?", (peer_id,))
            ((count,),) = run("SELECT count(*) FROM devices")
            if count >= _MOST_OPEN:
                raise Refused(
                    429, "slow_down", f"{_MOST_OPEN} sign-ins of nodes wait; try again later"
                )
            run(
                "INSERT INTO devices (hash, user_code, peer_id, name, is_move, asked_at,"
                " expires_at) VALUES (?, ?, ?, ?, ?, 0, ?)",
                row,
            )
        return device_code, user_code

    async def token(
        self,
        request: web.Request,
        form: Form,
    ) -> dict[str, object]:
        """Answer a node that asks whether a person has allowed it."""
        if _field(form, "grant_type") != DEVICE_GRANT:
            raise Refused(400, "unsupported_grant_type", f"expected {DEVICE_GRANT}")
        try:
            return await self._site.in_thread(self._token, digest(_field(form, "device_code")))
        except Refused as refused:
            is_wrong = refused.error == _OVER
            if is_wrong and not self._wrong_codes.take(self._site.source(request)):
                raise Refused(429, "slow_down", "wrong codes came from this address") from None
            raise

    def _token(self, key: bytes) -> dict[str, object]:
        now = time.time()
        rows = self._database.execute(
            "SELECT peer_id, name, account_id, is_denied, asked_at FROM devices WHERE hash = ? AND"
            " expires_at > ?",
            (key, now),
        )
        if not rows:
            raise Refused(400, _OVER, "this sign-in is over; begin it again")
        peer_id, name, account_id, is_denied, asked_at = rows[0]
        if is_denied:
            raise Refused(400, "access_denied", "the person refused")
        if now - asked_at < _POLL_SECONDS - 1:
            raise Refused(400, "slow_down", f"ask every {_POLL_SECONDS} s")
        # Written only for polls at the right rate, because it waits for the disk.
        self._database.execute("UPDATE devices SET asked_at = ? WHERE hash = ?", (now, key))
        if account_id is None:
            raise Refused(400, "authorization_pending", "nobody has typed the code yet")
        accounts = self._site.accounts
        with self._database.transaction() as run:
            if not run("DELETE FROM devices WHERE hash = ? RETURNING 1", (key,)):
                raise Refused(400, _OVER, "this sign-in is over; begin it again")
            account = accounts.by_id(account_id, run)
            token = accounts.link_in(run, account, peer_id, name)
        return {"access_token": token, "token_type": "Bearer", "account": account.address}

    # ---- for people

    async def show(
        self,
        request: web.Request,
        visitor: Visitor,
    ) -> web.Response:
        code = request.query.get("code", "")[:20]
        return self._site.page(request, "device.html", visitor, code=code, peer=None)

    async def confirm(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        """Show which node has the code, before anything is allowed."""
        user_code, row = await self._row(request, visitor, form)
        peer_id, name, is_move = row
        return self._site.page(
            request,
            "device.html",
            visitor,
            code=user_code,
            peer=peer_id,
            name=name,
            animal_name=identity.animal_name(peer_id),
            is_move=bool(is_move),
            problem=await self._site.in_thread(
                self._problem, visitor.account, peer_id, bool(is_move)
            ),
        )

    async def allow(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        user_code, (peer_id, _, is_move) = await self._row(request, visitor, form)
        is_allowed = text_of(form, "answer") == "allow"
        problem = await self._site.in_thread(self._problem, visitor.account, peer_id, bool(is_move))
        if is_allowed and problem is not None:
            raise problem
        await self._site.in_thread(
            self._database.execute,
            "UPDATE devices SET account_id = ?, is_denied = ? WHERE user_code = ? AND account_id"
            " IS NULL",
            (visitor.account.id if is_allowed else None, int(not is_allowed), user_code),
        )
        return self._site.page(
            request,
            "device_done.html",
            visitor,
            is_allowed=is_allowed,
            animal_name=identity.animal_name(peer_id),
        )

    async def _row(
        self, request: web.Request, visitor: Visitor, form: Form
    ) -> tuple[str, tuple[str, str, int]]:
        """Return the code and the node that waits with it. Raises Refused; guesses are counted."""
        site = self._site
        # Counted per person, not per address: others behind the same address are not affected.
        guess = site.lockouts.count(f"person {visitor.account.id}", None)
        letters = text_of(form, "code", 20).upper().replace("-", "").replace(" ", "")
        user_code = f"{letters[:4]}-{letters[4:]}"
        rows = await site.in_thread(
            self._database.execute,
            "SELECT peer_id, name, is_move FROM devices WHERE user_code = ? AND expires_at > ? AND"
            " account_id IS NULL",
            (user_code, time.time()),
        )
        if not rows:
            raise Refused(
                400, "CodeWrong", "no node waits with this code; look at the terminal again"
            )
        guess.take_back()
        return user_code, rows[0]

    def _problem(
        self,
        account: Account,
        peer_id: str,
        is_move: bool,
    ) -> Refused | None:
        """Return why the account can't have the node; None: it can."""
        return self._site.accounts.find_problem(account, peer_id) or self._chain_problem(
            account, peer_id, is_move
        )

    def _chain_problem(
        self,
        account: Account,
        peer_id: str,
        is_move: bool,
    ) -> Refused | None:
        try:
            owner = self._site.coordinator.owner_of(peer_id)
        except ChainError as error:
            return Refused(503, "ChainUnreachable", f"the chain does not answer: {error}")
        if owner is None or owner.lower() == account.address.lower() or is_move:
            return None
        return peer_taken(peer_id, owner, account.address)


def _field(form: Form, name: str) -> str:
    text = str(form.get(name, ""))
    if len(text) > _FIELD_BYTES:
        raise Refused(400, "invalid_request", f"{name}: too long")
    return text
