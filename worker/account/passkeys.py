"""Passkeys (WebAuthn): people who are signed in add them, and can then sign in with them."""

import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler
from webauthn import (
    base64url_to_bytes,
    generate_authentication_options,
    generate_registration_options,
    options_to_json,
    verify_authentication_response,
    verify_registration_response,
)
from webauthn.helpers import bytes_to_base64url
from webauthn.helpers.exceptions import WebAuthnException
from webauthn.helpers.structs import (
    AuthenticatorSelectionCriteria,
    PublicKeyCredentialDescriptor,
    ResidentKeyRequirement,
    UserVerificationRequirement,
)
from webauthn.registration.verify_registration_response import VerifiedRegistration

from worker.account.account_pages import bytes_of, require_fresh
from worker.account.request_bodies import Refused
from worker.account.site import Form, Site, Visitor, see

log = logging.getLogger(__name__)

_MAX_PASSKEYS = 20
_VERIFIED = UserVerificationRequirement.REQUIRED
_ADDING, _SIGNING_IN = "adding", "signing in"
"""Purposes of a challenge; one made for the other purpose is refused."""


class Passkeys:
    """`/passkeys/...`: JSON for the page's script, and a form to remove one."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._database = site.accounts.database

    def add_to(self, application: web.Application) -> None:
        router = application.router
        router.add_post("/passkeys/begin-adding", self._answering(self.begin_adding))
        router.add_post("/passkeys/add", self._answering(self.add))
        router.add_post("/passkeys/begin", self._answering(self.begin))
        router.add_post("/passkeys/sign-in", self._answering(self.sign_in))
        router.add_post("/passkeys/remove", self._site.signed_in(self.remove, is_post=True))

    def _answering(
        self, handle: Callable[[web.Request, dict[str, Any]], Awaitable[web.Response]]
    ) -> Handler:
        """Return a handler for JSON from our own pages; it answers refusals with a sentence."""

        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                self._site.require_own_page(request)
                body = json.loads(await request.text())
                if not isinstance(body, dict):
                    raise Refused(400, "BodyInvalid", "expected a JSON object")
                return await handle(request, body)
            except Refused as refused:
                content = {"error": refused.detail or refused.error}
                return web.json_response(content, status=refused.status)
            except (ValueError, KeyError, TypeError, RecursionError, WebAuthnException) as error:
                content = {"error": f"not a valid passkey: {type(error).__name__}"}
                return web.json_response(content, status=400)

        return answer

    # ---- adding

    async def begin_adding(
        self,
        request: web.Request,
        body: dict[str, Any],
    ) -> web.Response:
        site = self._site
        visitor = await self._visitor(request, body)
        site.require_private(request)
        require_fresh(visitor)
        keys = await site.in_thread(self._keys_of, visitor.account.id)
        _require_room(len(keys))
        options = generate_registration_options(
            rp_id=self._party(request),
            rp_name="hivewright",
            user_name=visitor.session.email or "operator",
            user_id=str(visitor.account.id).encode(),
            authenticator_selection=AuthenticatorSelectionCriteria(
                resident_key=ResidentKeyRequirement.REQUIRED, user_verification=_VERIFIED
            ),
            exclude_credentials=[PublicKeyCredentialDescriptor(key) for key in keys],
        )
        return await self._begun(
            request,
            _ADDING,
            options_to_json(options),
            options.challenge,
            {"account": visitor.account.id},
        )

    async def add(
        self,
        request: web.Request,
        body: dict[str, Any],
    ) -> web.Response:
        site = self._site
        visitor = await self._visitor(request, body)
        site.require_private(request)
        require_fresh(visitor)
        challenge, data = await self._challenge(request, _ADDING)
        if data["account"] != visitor.account.id:
            raise Refused(
                403, "AccountChanged", "this was begun for another account; reload the page"
            )
        verified = verify_registration_response(
            credential=body["credential"],
            expected_challenge=challenge,
            expected_rp_id=self._party(request),
            expected_origin=site.address(request),
            require_user_verification=True,
        )
        await site.in_thread(self._keep, visitor, verified)
        log.info("passkey added account=%s", visitor.account.address)
        return web.json_response({})

    def _keep(
        self,
        visitor: Visitor,
        verified: VerifiedRegistration,
    ) -> None:
        """Add the passkey. Raises Refused if the account has as many as it may have."""
        with self._database.transaction() as run:
            ((count,),) = run(
                "SELECT count(*) FROM passkeys WHERE account_id = ?", (visitor.account.id,)
            )
            _require_room(count)
            run(
                "INSERT OR IGNORE INTO passkeys (credential_id, account_id, public_key, sign_count,"
                " added_at, email) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    verified.credential_id,
                    visitor.account.id,
                    verified.credential_public_key,
                    verified.sign_count,
                    time.time(),
                    visitor.session.email,
                ),
            )

    async def remove(
        self,
        request: web.Request,
        visitor: Visitor,
        form: Form,
    ) -> web.Response:
        await self._site.in_thread(
            self._database.execute,
            "DELETE FROM passkeys WHERE credential_id = ? AND account_id = ?",
            (bytes_of(form, "passkey"), visitor.account.id),
        )
        return see("/settings")

    # ---- signing in

    async def begin(
        self,
        request: web.Request,
        body: dict[str, Any],
    ) -> web.Response:
        site = self._site
        site.require_private(request)
        await site.count_begun(request)
        options = generate_authentication_options(
            rp_id=self._party(request), user_verification=_VERIFIED
        )
        data = {name: str(body.get(name, ""))[:20] for name in ("next", "code")}
        return await self._begun(
            request, _SIGNING_IN, options_to_json(options), options.challenge, data
        )

    async def sign_in(
        self,
        request: web.Request,
        body: dict[str, Any],
    ) -> web.Response:
        site = self._site
        credential = body["credential"]
        rows = await site.in_thread(
            self._database.execute,
            "SELECT account_id, public_key, sign_count, email FROM passkeys WHERE"
            " credential_id = ?",
            (base64url_to_bytes(credential["rawId"]),),
        )
        challenge, data = await self._challenge(request, _SIGNING_IN)
        account_id, public_key, sign_count, email = rows[0] if rows else (0, b"", 0, None)
        account = await site.in_thread(site.accounts.by_id, account_id) if rows else None
        known = await site.known_browser(request, account)
        guess = site.lockouts.count(
            site.source(request), f"passkey {account_id}" if account else None, known
        )
        if account is None or (account.is_operator and not site.is_operator(email)):
            raise Refused(403, "PasskeyUnknown", "this passkey belongs to no account here")
        verified = verify_authentication_response(
            credential=credential,
            expected_challenge=challenge,
            expected_rp_id=self._party(request),
            expected_origin=site.address(request),
            credential_public_key=public_key,
            credential_current_sign_count=sign_count,
            require_user_verification=True,
        )
        guess.take_back()
        await site.in_thread(
            self._database.execute,
            "UPDATE passkeys SET sign_count = ? WHERE credential_id = ?",
            (verified.new_sign_count, verified.credential_id),
        )
        entered = await site.let_in(request, account, data, "passkey", email or "")
        response = web.json_response({"next": entered.headers["Location"]})
        response.cookies.update(entered.cookies)
        return response

    # ----

    async def _visitor(
        self,
        request: web.Request,
        body: dict[str, Any],
    ) -> Visitor:
        """Return the signed-in person. Raises Refused without the page's CSRF token."""
        visitor = await self._site.visitor(request)
        shown = str(body.get("csrf", "")).encode()
        if visitor is None or not hmac.compare_digest(shown, visitor.session.csrf.encode()):
            raise Refused(403, "FormOld", "this page is of another session; reload it")
        return visitor

    async def _begun(
        self,
        request: web.Request,
        purpose: str,
        options: str,
        challenge: bytes,
        data: dict[str, Any],
    ) -> web.Response:
        """Answer with the options, and store the browser's challenge with its purpose."""
        kept = {**data, "purpose": purpose, "challenge": bytes_to_base64url(challenge)}
        cookie = await self._site.in_thread(self._site.sessions.begin, kept)
        response = web.json_response(text=options)
        self._site.begin(request, response, cookie)
        return response

    async def _challenge(
        self,
        request: web.Request,
        purpose: str,
    ) -> tuple[bytes, dict[str, Any]]:
        """Return the challenge that this browser got; it can be answered once.

        Raises Refused if it is missing or was for another purpose.
        """
        site = self._site
        sign_in = await site.in_thread(site.sessions.sign_in, site.sign_in_cookie(request))
        if sign_in.data.get("purpose") != purpose:
            raise Refused(
                400, "ChallengeOfAnother", "this answers another request; reload the page"
            )
        await site.in_thread(site.sessions.complete, sign_in)
        return base64url_to_bytes(sign_in.data["challenge"]), sign_in.data

    def _party(self, request: web.Request) -> str:
        """Return the host name that passkeys are bound to. Raises Refused for an IP address."""
        name = urlsplit(self._site.address(request)).hostname or ""
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name
        raise Refused(
            400, "NameNeeded", f"passkeys need a host name; open this page by one, not by {name}"
        )

    def _keys_of(self, account_id: int) -> list[bytes]:
        rows = self._database.execute(
            "SELECT credential_id FROM passkeys WHERE account_id = ?", (account_id,)
        )
        return [row[0] for row in rows]


def _require_room(num_passkeys: int) -> None:
    if num_passkeys >= _MAX_PASSKEYS:
        raise Refused(400, "TooManyPasskeys", f"an account has at most {_MAX_PASSKEYS}")
