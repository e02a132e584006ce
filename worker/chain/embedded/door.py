"""The door in front of the embedded chain: a filtering proxy, the only client of anvil.

anvil executes any request: it sends as any account, sets any balance and runs any code. The door
forwards only reads and signed transactions. Its socket in the chain's folder, which only the
chain's own roles can open, also allows the creation of contracts. Its TCP port (`anvil.host`,
`anvil.port`) is open to the whole machine, so a `Gate` and quotas apply there. If the chain runs in
its own network namespace (as in the deploy's unit), only the socket can be reached, not anvil's
port.
"""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from pydantic_core import from_json

from worker import settings
from worker.chain.embedded.gate import (
    MAX_BATCH,
    METHODS,
    NOT_SERVED,
    REJECTED,
    TOO_MANY,
    Gate,
    NotPassed,
    Passed,
)
from worker.chain.http import socket_name
from worker.chain.quotas import Quota
from worker.errors import ResourceError
from worker.log import printable
from worker.runtime.host import require_port

log = logging.getLogger(__name__)

SOCKET = Path("rpc/chain.sock")
"""Path of the socket below the folder of the chain's state."""

FUND_METHOD = "anvil_setBalance"
"""Method accepted only through the socket. Clients with a fixed gas price need money."""

_LOOPBACK = "127.0.0.1"
_MAX_BODY_BYTES, _MAX_TRUSTED_BYTES = 256 * 1024, 32 << 20
_MAX_TRUSTED_BATCH = 1000
_ANSWER_SECONDS = 30.0
_START_SECONDS = 30.0
_MAX_AT_CHAIN = 16
# Limits on transactions through the TCP port: for each account, and for all together.
_SENDS_PER_SECOND, _SENDS_BURST = 0.2, 60.0
_ALL_SENDS_PER_SECOND, _ALL_SENDS_BURST = 2.0, 200.0
_MAX_SENT = 1000


def socket_of(anvil: settings.Anvil) -> Path:
    """Return the socket for the chain's own roles."""
    return anvil.state_file.parent.resolve() / SOCKET


class Door:
    """Answers at `url` and at the socket. `target` is anvil's URL; None while it does not run."""

    def __init__(
        self,
        url: str,
        chain_id: int,
    ) -> None:
        self.url = url
        self.target: str | None = None
        self._latest = 0
        self._gate = Gate(chain_id, None, lambda: self._latest)
        self._sends = Quota(_SENDS_PER_SECOND, _SENDS_BURST)
        self._all_sends = Quota(_ALL_SENDS_PER_SECOND, _ALL_SENDS_BURST)
        # The last forwarded transactions, in order. The nonces of older ones are used.
        self._sent: dict[str, None] = {}
        self._at_chain = asyncio.Semaphore(_MAX_AT_CHAIN)

    def application(self, is_trusted: bool) -> web.Application:
        async def answer(request: web.Request) -> web.Response:
            return await self._answer(request, is_trusted)

        application = web.Application(
            client_max_size=_MAX_TRUSTED_BYTES if is_trusted else _MAX_BODY_BYTES
        )
        application.router.add_post("/{path:.*}", answer)
        application.cleanup_ctx.append(self._resources)
        return application

    async def _resources(
        self,
        application: web.Application,
    ) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
        ) as session:
            application[_SESSION] = session
            yield

    async def _answer(
        self,
        request: web.Request,
        is_trusted: bool,
    ) -> web.Response:
        try:
            asked = from_json(await request.read())
        except ValueError:
            return web.json_response({"error": "body: expected JSON-RPC"}, status=400)
        calls = asked if isinstance(asked, list) else [asked]
        most = _MAX_TRUSTED_BATCH if is_trusted else MAX_BATCH
        are_objects = all(isinstance(call, dict) for call in calls)
        if not are_objects or not 1 <= len(calls) <= most:
            return web.json_response(
                {"error": f"body: expected 1 to {most} JSON-RPC requests"}, status=400
            )
        try:
            answers = await self._answers(calls, request.app[_SESSION], is_trusted)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return web.json_response(
                {"error": f"the chain does not answer ({type(error).__name__})"}, status=503
            )
        return web.json_response(answers if isinstance(asked, list) else answers[0])

    async def _answers(
        self,
        calls: list[dict[str, Any]],
        session: aiohttp.ClientSession,
        is_trusted: bool,
    ) -> list[Any]:
        """Return a JSON-RPC answer for each call; the refusals come first."""
        answers: list[Any] = []
        passed: list[dict[str, Any]] = []
        if not is_trusted:
            await self._learn_block(session)
        for call in calls:
            try:
                if is_trusted:
                    passed.append(self._trusted(call))
                else:
                    passed.append(await self._checked(call, session))
            except NotPassed as refusal:
                error = {"code": refusal.code, "message": str(refusal)}
                answers.append({"jsonrpc": "2.0", "id": _id_of(call), "error": error})
        if passed:
            answers += await self._ask(session, passed)
        return answers

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        calls: list[dict[str, Any]],
    ) -> list[Any]:
        if self.target is None:
            raise aiohttp.ClientError
        body: Any = calls if len(calls) > 1 else calls[0]
        async with self._at_chain, session.post(self.target, json=body) as response:
            answer = await response.json(content_type=None)
        return answer if isinstance(answer, list) else [answer]

    async def _learn_block(self, session: aiohttp.ClientSession) -> None:
        asked = _request(0, "eth_blockNumber", [])
        (answer,) = await self._ask(session, [asked])
        self._latest = int(answer["result"], 16)

    def _trusted(
        self,
        call: dict[str, Any],
    ) -> dict[str, Any]:
        method = call.get("method")
        if method not in METHODS and method != FUND_METHOD:
            raise NotPassed(NOT_SERVED, f"{printable(str(method))[:64]}: not served here")
        return _request(_id_of(call), method, call.get("params", []))

    async def _checked(
        self, call: dict[str, Any], session: aiohttp.ClientSession
    ) -> dict[str, Any]:
        method, params = str(call.get("method")), call.get("params", [])
        passed = self._gate.check(method, params)
        if passed.sender is not None:
            await self._count_sent(passed, passed.sender, session)
        return _request(_id_of(call), passed.method, passed.params)

    async def _count_sent(
        self, passed: Passed, sender: str, session: aiohttp.ClientSession
    ) -> None:
        """Count a transaction for its sender, or raise NotPassed.

        Copies of transactions that are pending or on the chain are not counted, because anyone can
        send them.
        """
        raw = str(passed.params[0])
        if raw in self._sent:
            return
        asked = _request(0, "eth_getTransactionCount", [sender, "latest"])
        (answer,) = await self._ask(session, [asked])
        next_nonce = int(answer["result"], 16)
        if passed.nonce < next_nonce:
            reason = f"nonce too low: next nonce {next_nonce}, tx nonce {passed.nonce}"
            raise NotPassed(REJECTED, f"{passed.method}: {reason}")
        if not (self._sends.take(sender) and self._all_sends.take("all")):
            raise NotPassed(
                TOO_MANY,
                f"{passed.method}: too many transactions lately from {sender}, or from all senders"
                " on this machine",
            )
        self._sent[raw] = None
        if len(self._sent) > _MAX_SENT:
            self._sent.pop(next(iter(self._sent)))


_SESSION = web.AppKey("session", aiohttp.ClientSession)


def _id_of(call: dict[str, Any]) -> int | str | None:
    found = call.get("id")
    return found if isinstance(found, (int, str)) else None


def _request(
    id: int | str | None,
    method: Any,
    params: Any,
) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": params}


@contextmanager
def opened(
    anvil: settings.Anvil,
    chain_id: int,
) -> Iterator[Door]:
    """Open a door at `anvil.host` and `anvil.port` and at the chain's socket, until the block ends.

    It runs in a thread. Raises ResourceError if the port is in use or the socket can't be created.
    """
    host = _LOOPBACK if _is_walled() else anvil.host
    require_port(host, anvil.port, "anvil.port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, anvil.port), family=family)
    port = int(listening.getsockname()[1])
    shown = f"[{host}]" if ":" in host else host
    private = _private_socket(socket_of(anvil))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="door", daemon=True)
    thread.start()

    async def start() -> tuple[Door, list[web.AppRunner]]:
        door = Door(f"http://{shown}:{port}", chain_id)
        runners = []
        for sock, is_trusted in ((listening, False), (private, True)):
            runner = web.AppRunner(
                door.application(is_trusted), access_log=None, shutdown_timeout=1.0
            )
            await runner.setup()
            await web.SockSite(runner, sock).start()
            runners.append(runner)
        return door, runners

    async def stop(runners: list[web.AppRunner]) -> None:
        for runner in runners:
            await runner.cleanup()

    try:
        door, runners = asyncio.run_coroutine_threadsafe(start(), loop).result(_START_SECONDS)
        try:
            yield door
        finally:
            asyncio.run_coroutine_threadsafe(stop(runners), loop).result(_START_SECONDS)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_START_SECONDS)
        loop.close()
        listening.close()
        private.close()
        socket_of(anvil).unlink(missing_ok=True)


def _private_socket(file: Path) -> socket.socket:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.parent.chmod(0o700)
        file.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(socket_name(file))
        os.chmod(file, 0o600)
        sock.listen(128)
    except OSError as error:
        raise ResourceError(
            f"{file}: {error.strerror}; expected a folder in which the chain's socket can be made"
        ) from None
    return sock


def _is_walled() -> bool:
    """Return whether this process has a network namespace with only loopback."""
    return [name for _, name in socket.if_nameindex()] == ["lo"]
