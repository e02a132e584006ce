"""The account service (`hivewright account`): signs and sends for the nodes of its accounts.

It implements the login API of RL Swarm (register-peer, submit-reward, submit-winner,
get-api-key-status), issues tokens at enrolment, and lets nodes without a route to the chain read it
through /rpc. It starts and keeps running without a chain: calls that need one answer 503
ChainUnreachable.
"""

import asyncio
import base64
import hmac
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler

from worker.account import request_bodies
from worker.account.account_pages import AccountPages
from worker.account.accounts import OPERATOR_ID, Account, Accounts, digest, require_active
from worker.account.device_flow import DeviceFlow
from worker.account.host_pages import HostPages
from worker.account.invitations import PREFIX as INVITATION
from worker.account.lockouts import Lockouts
from worker.account.market_pages import MarketPages
from worker.account.moves import Moves
from worker.account.openid import OpenId
from worker.account.passkeys import Passkeys
from worker.account.queues import Queues
from worker.account.request_bodies import Refused
from worker.account.sign_in_pages import SignInPages
from worker.account.site import Site
from worker.account.vault import load_account
from worker.chain import peer_proof
from worker.chain.client import Call
from worker.chain.coordinator import Coordinator
from worker.chain.embedded.gate import MAX_BATCH, TOO_MANY, Gate, NotPassed, Passed
from worker.chain.enrolment_proof import purpose_of_enrolment
from worker.chain.http import UNIX, socket_name
from worker.chain.market import Market
from worker.chain.peer_proof import Proof
from worker.chain.quotas import Quota
from worker.chain.rpc import Rpc
from worker.errors import ChainUnreachable, ContractRefused, SettingsError, WorkerError
from worker.log import printable
from worker.runtime import systemd, webguard, webservice
from worker.runtime.files import LINE, read_secret
from worker.runtime.outage import Outage
from worker.settings import Settings

log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 256 * 1024
_MAX_RPC_ANSWER_BYTES = 16 * 1024 * 1024
_NUM_THREADS = 64
"""Number of calls other than /rpc that may wait for the chain at once; the queue batches them."""
_READ_SECONDS = 10.0
"""Time limit for a client to send a body."""
# A node makes a few reads per poll of the round, and a few transactions per round.
_RPC_PER_SECOND, _RPC_BURST = 20.0, 400.0
_SENDS_PER_SECOND, _SENDS_BURST = 0.2, 60.0
# Wrong tokens from one address: after a burst, one every six seconds.
_GUESSES_PER_SECOND, _GUESSES_BURST = 1 / 6, 20.0
# Wrong enrolment tokens from everywhere: after a burst, two a minute.
_FLEET_GUESSES = (1 / 30, 100.0)
# Requests in progress at the chain, for all callers and for one caller; for one they count until
# the caller has read the answer.
_MAX_AT_CHAIN, _MAX_AT_CHAIN_FOR_ONE = 16, 4

_OF_GUESSES_AND_FLOODS = (401, 403, 408, 415, 429)
"""Statuses whose callers may retry at once: the log of these is rate-limited."""

_Body = TypeVar("_Body", bound=request_bodies.RegisterPeer)
_Result = TypeVar("_Result")


class Pages(Protocol):
    """A part of the site."""

    def add_to(self, application: web.Application) -> None: ...


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; the URL is in `<account.state_dir>/address` when ready.

    Raises ResourceError if the port is in use, SettingsError or IdentityError if a file in the
    settings, or the account's key, is missing.
    """
    if settings.chain.rpc_url is None and settings.chain.deployment_file is None:
        raise SettingsError(
            "chain.rpc_url and chain.deployment_file: both empty; the account service needs a chain"
            " of its own; set one"
        )
    webservice.run("account", settings.account, lambda: Service(settings))


class Service:
    """The HTTP calls. Work that waits for the chain or the disk runs in threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._coordinator = Coordinator(settings.chain)
        # Read files that may be missing first, so that a service that can't start creates nothing.
        self._enrolment_token = _enrolment_token(settings)
        folder = settings.account.state_dir
        passphrase = _passphrase(settings)
        operator = load_account(folder)
        self.address = str(operator.address)
        self.accounts = Accounts(folder, operator, settings.chain.operator_org_id, passphrase)
        self.queues = Queues(self._coordinator, folder, self.accounts.key_of)
        self.queues.remove_journals(self.accounts.deleted_addresses())
        self.queues.open_journals(self.accounts.all())
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "account")
        self._site = Site(
            settings,
            self.accounts,
            self.queues,
            self._coordinator,
            self._in_thread,
            self._source,
        )
        self._pages = self._make_pages() if self.accounts.has_people else ()
        self._gate: Gate | None = None
        self._requests = Quota(_RPC_PER_SECOND, _RPC_BURST)
        self._sends = Quota(_SENDS_PER_SECOND, _SENDS_BURST)
        self._lockouts = Lockouts((_GUESSES_PER_SECOND, _GUESSES_BURST), _FLEET_GUESSES)
        self._wrong_tokens = Quota(_GUESSES_PER_SECOND, _GUESSES_BURST)
        """Limit of wrong tokens of nodes. They can't be guessed, so they do not block enrolment."""
        self._sparingly = webguard.Sparingly()
        self._at_chain = asyncio.Semaphore(_MAX_AT_CHAIN)
        self._at_chain_for: Counter[str] = Counter()
        self._chain_outage = Outage(log)

    def application(self) -> web.Application:
        application = web.Application(
            client_max_size=_MAX_BODY_BYTES, middlewares=[self._answer_errors]
        )
        application.router.add_get("/api/get-api-key-status", self.get_api_key_status)
        application.router.add_post("/api/register-peer", self.register_peer)
        application.router.add_post("/api/submit-reward", self.submit_reward)
        application.router.add_post("/api/submit-winner", self.submit_winner)
        application.router.add_post("/api/bet-token-balance", self.bet_token_balance)
        application.router.add_post("/api/guess-answer", self.guess_answer)
        application.router.add_post("/api/claim-reward", self.claim_reward)
        application.router.add_post("/api/enrol", self.enrol)
        application.router.add_get("/api/swarm", self.swarm)
        if self._pages:
            application[webguard.FORMS] = True
        for pages in self._pages:
            pages.add_to(application)
        if self._settings.account.rpc_proxy:
            application.router.add_post("/rpc", self.rpc)
        application.cleanup_ctx.append(self._resources)
        return application

    def _make_pages(self) -> tuple[Pages, ...]:
        """Return the pages where people sign in and see their accounts."""
        site, has_openid = self._site, self._settings.account.oidc_issuer is not None
        return (
            site,
            SignInPages(site, has_openid, has_passkeys=True),
            AccountPages(site),
            MarketPages(site),
            HostPages(site),
            DeviceFlow(site),
            Moves(site),
            Passkeys(site),
            *((OpenId(site),) if has_openid else ()),
        )

    def started(self, url: str) -> None:
        log.info(
            "account service up url=%s account=%s org_id=%s",
            url,
            self.address,
            self._settings.chain.operator_org_id,
        )

    async def tend(self) -> None:
        """Tend pending transactions, forever."""
        outage = Outage(log)
        unwritten = Outage(log)
        while True:
            try:
                num_waiting = await asyncio.to_thread(self.queues.tend)
                systemd.progress(f"{num_waiting} transactions pending")
                outage.end("transactions are sent again")
            except WorkerError as error:
                outage.begin("transactions wait error=%s", error)
                systemd.progress("no chain")
            try:
                await asyncio.to_thread(self.queues.write_status)
                unwritten.end("state of the queues is written again")
            except WorkerError as error:
                unwritten.begin("state of the queues not written error=%s", error)
            await asyncio.sleep(self._settings.chain.poll_seconds)

    # ---- the login API of RL Swarm

    async def get_api_key_status(self, request: web.Request) -> web.Response:
        """Answer "activated", which nodes of RL Swarm wait for before they start."""
        org_id = request.query.get("orgId")
        if not org_id:
            raise Refused(400, "orgId: missing")
        account = await self._in_thread(lambda: self.accounts.by_org(org_id))
        is_active = account is not None and account.suspended_at is None
        return web.Response(text="activated" if is_active else "pending")

    async def register_peer(self, request: web.Request) -> web.Response:
        account, body = await self._authorized(request, request_bodies.Registration)
        proof = _decoded_proof(body.proof)
        return await self._send(
            account,
            lambda: peer_proof.registration(self._coordinator, body.peer_id, proof),
            body.peer_id,
        )

    async def submit_reward(self, request: web.Request) -> web.Response:
        account, body = await self._authorized(request, request_bodies.SubmitReward)
        return await self._send(
            account,
            lambda: self._coordinator.submit_reward(
                body.round_number, body.stage_number, body.reward, body.peer_id, body.groups_digest
            ),
            body.peer_id,
            body.round_number,
        )

    async def submit_winner(self, request: web.Request) -> web.Response:
        account, body = await self._authorized(request, request_bodies.SubmitWinner)
        return await self._send(
            account,
            lambda: self._coordinator.submit_winners(body.round_number, body.winners, body.peer_id),
            body.peer_id,
        )

    async def bet_token_balance(self, request: web.Request) -> web.Response:
        _, body = await self._authorized(request, request_bodies.RegisterPeer)
        balance = await self._in_thread(lambda: self._market().balance(body.peer_id))
        return web.json_response({"result": str(balance)})

    async def guess_answer(self, request: web.Request) -> web.Response:
        account, body = await self._authorized(request, request_bodies.GuessAnswer)
        return await self._send(
            account,
            lambda: self._market().guess_answer(
                body.game_id, body.peer_id, body.clue_id, body.choice_idx, int(body.bet)
            ),
            body.peer_id,
        )

    async def claim_reward(self, request: web.Request) -> web.Response:
        account, body = await self._authorized(request, request_bodies.ClaimReward)
        return await self._send(
            account, lambda: self._market().claim_reward(body.game_id, body.peer_id), body.peer_id
        )

    def _market(self) -> Market:
        address = self._market_address()
        if address is None:
            raise Refused(404, "NoMarket", "this swarm has no prediction market")
        return Market(self._coordinator, address)

    def _market_address(self) -> str | None:
        if self._settings.market.enabled is False:
            return None
        return self._settings.market.contract or self._coordinator.deployment.market

    # ---- ours

    async def enrol(self, request: web.Request) -> web.Response:
        """Issue a token to a peer with the fleet's enrolment token and a signature by its key."""
        body = request_bodies.parse(request_bodies.Enrol, await _read(request))
        is_invited = body.token.startswith(INVITATION) and self.accounts.has_people
        if self._enrolment_token is None and not is_invited:
            raise Refused(
                403,
                "EnrolmentClosed",
                "account.enrolment_token_file is not set at the account service",
            )
        await self._in_thread(lambda: self._require_proof(body, is_invited))
        await self._check_enrolment_token(request, body, is_invited)
        token = await self._in_thread(lambda: self._link(body, is_invited))
        log.info("peer enrolled peer_id=%s", body.peer_id)
        return web.json_response({"token": token})

    def _require_proof(
        self,
        body: request_bodies.Enrol,
        is_invited: bool,
    ) -> None:
        """Raise Refused unless the node's key signed for this enrolment.

        A signature without a challenge could be replayed by others. It is accepted only for the
        token of an operator's node, which is always the same.
        """
        is_old = body.challenge is None
        if is_old and (is_invited or not self.accounts.has_first_token(body.peer_id)):
            raise Refused(
                403,
                "ProofOld",
                "this node's hivewright is too old to prove its key here: upgrade it, and enrol"
                " again",
            )
        self._site.key_proofs.require(
            body.peer_id,
            _decoded("publicKey", body.public_key),
            _decoded("signature", body.signature),
            purpose_of_enrolment(body.token),
            body.challenge,
        )

    async def _check_enrolment_token(
        self, request: web.Request, body: request_bodies.Enrol, is_invited: bool
    ) -> None:
        """Raise Refused for a wrong enrolment token or invitation, which is counted.

        Wrong tokens from many addresses lock out new nodes, but not the fleet's nodes, because the
        caller has verified the node's signature. Invitations are too long to guess.
        """
        node = await self._in_thread(lambda: self.accounts.node(body.peer_id))
        is_known = node is not None and (is_invited or node.account_id == OPERATOR_ID)
        guess = self._lockouts.count(
            self._source(request),
            None if is_invited else "fleet",
            f"node {body.peer_id}" if is_known else None,
        )
        expected = (self._enrolment_token or "").encode()
        if is_invited:
            await self._in_thread(lambda: self._site.invitations.find(digest(body.token)))
        elif not hmac.compare_digest(body.token.encode(), expected):
            raise Refused(403, "EnrolmentTokenWrong", "not the account service's enrolment token")
        guess.take_back()

    def _link(
        self,
        body: request_bodies.Enrol,
        is_invited: bool,
    ) -> str:
        """Link the node to the invitation's account, or to the fleet's; return its token."""
        if is_invited:
            return self._site.invitations.enrol(body.token, body.peer_id)
        return self.accounts.link(self.accounts.operator, body.peer_id)

    async def swarm(self, request: web.Request) -> web.Response:
        """Describe the chain, and the account of the caller's token, else the operator's."""
        account = await self._in_thread(lambda: self.accounts.operator)
        if "Authorization" in request.headers:
            with suppress(Refused):
                _, account = await self._caller(request)
        deployment = await self._in_thread(lambda: self._coordinator.deployment)
        return web.json_response(
            {
                "chain_id": deployment.chain_id,
                "contract": deployment.contract,
                "org_id": account.org_id,
                "account": account.address,
                "market": await self._in_thread(self._market_address),
                "judge_url": self._settings.market.judge_url,
                "challenge": self._site.key_proofs.challenge(),
            }
        )

    async def rpc(self, request: web.Request) -> web.Response:
        """Forward requests that a `Gate` allows, for callers with a node's token or a session.

        The body is one request, or a batch.
        """
        peer_id = await self._rpc_caller(request)
        asked = request_bodies.parse_rpc(await _read(request), MAX_BATCH)
        calls = asked if isinstance(asked, list) else [asked]
        if not self._requests.take(peer_id, len(calls)):
            raise Refused(
                429,
                "TooManyRequests",
                f"{peer_id}: at most {_RPC_PER_SECOND:g} a second in the long run",
            )
        if self._at_chain_for[peer_id] >= _MAX_AT_CHAIN_FOR_ONE:
            raise Refused(
                429,
                "TooManyRequests",
                f"{peer_id}: {_MAX_AT_CHAIN_FOR_ONE} requests are in progress",
            )
        self._at_chain_for[peer_id] += 1
        try:
            async with self._at_chain:
                answers = await self._answers(calls, peer_id)
            text = answers[0]
            if isinstance(asked, list):
                text = b"[" + b",".join(answers) + b"]"
            del answers  # answers may be large, and the client may be slow to read
            response = web.Response(body=text, content_type="application/json")
            # Answers that the client has not read yet count too: each may take 16 MB.
            with suppress(ConnectionError):  # the client has left
                await response.prepare(request)
                await response.write_eof()
            return response
        finally:
            self._at_chain_for[peer_id] -= 1
            if not self._at_chain_for[peer_id]:
                del self._at_chain_for[peer_id]

    async def _rpc_caller(self, request: web.Request) -> str:
        """Return the name whose quota a call uses: the token's peer, or the signed-in person.

        The guard refuses requests of foreign pages. Raises Refused.
        """
        if self._pages and "Authorization" not in request.headers and "Origin" in request.headers:
            visitor = await self._site.visitor(request)
            if visitor is not None:
                self._site.require_own_page(request)
                self._site.require_private(request)
                require_active(visitor.account)
                return visitor.account.address
        peer_id, account = await self._caller(request)
        require_active(account)
        await self._in_thread(lambda: self.accounts.note_use(account, peer_id))
        return peer_id

    async def _answers(
        self,
        calls: list[request_bodies.RpcRequest],
        peer_id: str,
    ) -> list[bytes]:
        answers = []
        for call in calls:
            answers.append(await self._answer(call, peer_id))
            if sum(map(len, answers)) > _MAX_RPC_ANSWER_BYTES:
                raise Refused(
                    502, f"{call.method}: the chain's answers are too long; ask for less at once"
                )
        return answers

    async def _answer(
        self,
        call: request_bodies.RpcRequest,
        peer_id: str,
    ) -> bytes:
        """Return the chain's answer, or the reason why the call is not forwarded, as JSON."""
        try:
            passed = await self._in_thread(
                lambda: self._gate_to_chain().check(call.method, call.params)
            )
            self._count_sent(passed, peer_id)
        except NotPassed as refusal:
            error = {"code": refusal.code, "message": str(refusal)}
            answer = {"jsonrpc": "2.0", "id": call.id, "error": error}
            return json.dumps(answer).encode()
        rpc = await self._in_thread(lambda: self._coordinator.rpc)
        body = {
            "jsonrpc": "2.0",
            "id": call.id,
            "method": passed.method,
            "params": passed.params,
        }
        for _ in range(rpc.num_addresses - 1):
            try:
                return await self._pass_on(body, rpc)
            except ChainUnreachable as error:
                log.debug("next rpc address after error=%s", error)
        return await self._pass_on(body, rpc)

    def _gate_to_chain(self) -> Gate:
        if self._gate is None:
            deployment = self._coordinator.deployment
            self._gate = Gate(
                deployment.chain_id,
                deployment.contract,
                self._coordinator.block_number,
                self._market_address(),
            )
        return self._gate

    def _count_sent(
        self,
        passed: Passed,
        peer_id: str,
    ) -> None:
        """Raise NotPassed if the peer has sent too many transactions lately.

        They are not counted per signer, because anyone can resend another account's transaction.
        """
        if passed.sender is not None and not self._sends.take(peer_id):
            limit = f"{60 * _SENDS_PER_SECOND:g} transactions a minute in the long run"
            raise NotPassed(
                TOO_MANY, f"{passed.method}: too many transactions of {peer_id}; at most {limit}"
            )

    async def _pass_on(
        self,
        body: dict[str, Any],
        rpc: Rpc,
    ) -> bytes:
        url = await self._in_thread(rpc.choose)
        timeout = aiohttp.ClientTimeout(
            total=self._settings.chain.timeout_seconds / rpc.num_addresses
        )
        answer = bytearray()
        try:
            session, place = self._session_to(url)
            async with session.post(place, json=body, timeout=timeout) as response:
                if response.status == 429:
                    raise rpc.throttled(url, response.headers)
                if 500 <= response.status < 600:
                    raise ChainUnreachable(f"{url}: HTTP {response.status} instead of an answer")
                async for piece in response.content.iter_chunked(65536):
                    answer += piece
                    if len(answer) > _MAX_RPC_ANSWER_BYTES:
                        raise Refused(
                            502,
                            f"{body['method']}: the chain's answer is too long; ask for less at"
                            " once",
                        )
        except (aiohttp.ClientError, TimeoutError) as error:
            rpc.failed(url)
            raise ChainUnreachable(f"{url}: no answer ({type(error).__name__})") from None
        except ChainUnreachable:
            rpc.failed(url)
            raise
        self._chain_outage.end("chain answers again")
        return bytes(answer)

    def _session_to(
        self,
        url: str,
    ) -> tuple[aiohttp.ClientSession, str]:
        """Return a session for the address, and the URL to use in it."""
        is_socket = url.startswith(UNIX)
        if url not in self._sessions:
            connector = None
            if is_socket:
                path = Path(url.removeprefix(UNIX))
                connector = aiohttp.UnixConnector(socket_name(path))
            session = aiohttp.ClientSession(connector=connector)
            self._open.push_async_callback(session.close)
            self._sessions[url] = session
        return self._sessions[url], "http://localhost/" if is_socket else url

    # ----

    async def _authorized(
        self,
        request: web.Request,
        model: type[_Body],
    ) -> tuple[Account, _Body]:
        """Return the caller's account, and the body if it is about that account and peer."""
        body = request_bodies.parse(model, await _read(request))
        if await self._in_thread(lambda: self.accounts.by_org(body.org_id)) is None:
            raise Refused(404, "User not found")
        peer_id, account = await self._caller(request)
        if account.org_id != body.org_id:
            raise Refused(404, "User not found", f"the token is of account {account.org_id}")
        if peer_id != body.peer_id:
            raise Refused(403, "TokenOfAnotherPeer", f"the token is good for {peer_id} only")
        require_active(account)
        return account, body

    def _source(self, request: web.Request) -> str:
        """Return the address for which wrong tokens are counted.

        Behind a proxy on this host, that is the client that the proxy names.
        """
        remote = str(request.remote)
        forwarded = request.headers.get("X-Forwarded-For", "")
        if self._settings.account.behind_proxy and forwarded and webguard.is_loopback(remote):
            # Each proxy appends its client's address; only the last entry is trustworthy.
            _, _, client = forwarded.rpartition(",")
            return f"forwarded {webguard.source_of(client.strip())}"
        return webguard.source_of(remote)

    async def _caller(self, request: web.Request) -> tuple[str, Account]:
        """Return peer and account of the token: Bearer, or the URL's password (Basic)."""
        token = _token_in(request.headers.get("Authorization", ""))
        if token is None:
            raise Refused(
                401,
                "TokenMissing",
                "expected the header Authorization: Bearer TOKEN, or http://peer:TOKEN@...",
            )
        caller = await self._in_thread(lambda: self.accounts.caller(token))
        if caller is None:
            if not self._wrong_tokens.take(self._source(request)):
                raise Refused(
                    429, "TooManyGuesses", "wrong tokens came from this address; wait a minute"
                )
            raise Refused(
                401,
                "TokenWrong",
                "this token is unknown here, revoked or expired; enrol the node again",
            )
        return caller

    async def _send(
        self,
        account: Account,
        build: Callable[[], Call],
        peer_id: str,
        round: int | None = None,
    ) -> web.Response:
        def send() -> str:
            call = build()
            self.accounts.note_use(account, peer_id)
            tx_hash = self.queues.send(
                account,
                call,
                lambda first: self.accounts.note_sent(account, peer_id, call.name, first, round),
            )
            log.info("sent call=%s peer_id=%s hash=%s", call.name, peer_id, tx_hash)
            return tx_hash

        tx_hash = await self._in_thread(send)
        self._chain_outage.end("chain answers again")
        return web.json_response({"hash": tx_hash})

    async def _in_thread(
        self,
        function: Callable[[], _Result],
    ) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def _resources(
        self,
        application: web.Application,
    ) -> AsyncIterator[None]:
        async with AsyncExitStack() as self._open:
            self._sessions: dict[str, aiohttp.ClientSession] = {}
            yield
        self._site.close()
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        self.queues.close()
        self.accounts.close()

    # ---- failures

    @web.middleware
    async def _answer_errors(
        self,
        request: web.Request,
        handler: Handler,
    ) -> web.StreamResponse:
        """Answer every failure with {"error": NAME OR SENTENCE}.

        A "detail" for people is added if the name alone is not clear.
        """
        try:
            return await handler(request)
        except web.HTTPRedirection:
            raise
        except web.HTTPException as error:
            return web.json_response(
                {"error": f"{printable(request.path)}: {error.reason}"}, status=error.status
            )
        except web.RequestPayloadError:
            # aiohttp must not try to read the rest of the body, so close the connection.
            request.content.feed_eof()
            content = {"error": "body: not encoded as its headers say"}
            log.warning("refused path=%s status=400 %s", request.path, json.dumps(content))
            response = web.json_response(content, status=400)
            response.force_close()
            return response
        except ContractRefused as error:
            self._chain_outage.end("chain answers again")
            return self._refusal(request, 400, error.name or str(error))
        except ChainUnreachable as error:
            self._chain_outage.begin(
                "chain unreachable, calls that need it get status=503 error=%s", error
            )
            return web.json_response(
                {"error": "ChainUnreachable", "detail": str(error)}, status=503
            )
        except Refused as refused:
            return self._refusal(request, refused.status, refused.error, refused.detail)
        except WorkerError as error:
            return self._refusal(request, 500, type(error).__name__, str(error))
        except OSError:
            if request.transport is not None:
                raise
            log.debug("client disconnected within its body path=%s", request.path)
            # No client reads this.
            return web.json_response({"error": "body: truncated"}, status=400)

    def _refusal(
        self,
        request: web.Request,
        status: int,
        error: str,
        detail: str | None = None,
    ) -> web.Response:
        """Log a refusal, and return the answer for it."""
        content = {"error": error}
        if detail:
            content["detail"] = detail
        said = f"refused path={request.path} status={status} {json.dumps(content)}"
        if status in _OF_GUESSES_AND_FLOODS:
            self._sparingly.warn(str(status), f"{said} from={request.remote}")
        else:
            log.warning("%s", said)
        headers = {"Retry-After": "10"} if status == 429 else None
        return web.json_response(content, status=status, headers=headers)


async def _read(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_READ_SECONDS):
            return await request.read()
    except TimeoutError:
        raise Refused(
            408, f"body: not complete after {_READ_SECONDS:g} s; send it faster"
        ) from None


def _enrolment_token(settings: Settings) -> str | None:
    """Return the enrolment token; None: enrolment is closed."""
    file = settings.account.enrolment_token_file
    if file is None:
        return None
    return read_secret(file, "one line with a token", "account.enrolment_token_file", LINE)


def _passphrase(settings: Settings) -> str | None:
    """Return the passphrase of people's keys; None: people have no accounts here."""
    file = settings.account.passphrase_file
    if file is None:
        return None
    return read_secret(file, "one line with a passphrase", "account.passphrase_file", LINE)


def _token_in(authorization: str) -> str | None:
    scheme, _, value = authorization.partition(" ")
    value = value.strip()
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return None
    return value if scheme.lower() in ("bearer", "basic") and value else None


def _decoded(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise Refused(400, f"{name}: expected base 64") from None


def _decoded_proof(shown: request_bodies.ShownProof | None) -> Proof | None:
    if shown is None:
        return None
    public_key = _decoded("proof/publicKey", shown.public_key)
    signature = _decoded("proof/signature", shown.signature)
    return Proof(public_key, signature, shown.is_move)
