"""What the tests of sender, accounts, settlement and server share: the service in a thread, and a bad network."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import requests
from aiohttp import web

from worker import settings
from worker.account.server import Service
from worker.chain.accounts import AccountClient
from worker.swarm import identity
from worker.swarm.identity import Identity

ENROLMENT_TOKEN = "let me in"


def account_settings(chain: settings.Settings, folder: Path) -> settings.Settings:
    """Settings of an account service for the chain of `chain`, with everything in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    token_file = folder / "enrolment.token"
    token_file.write_text(ENROLMENT_TOKEN + "\n")
    account = settings.Account(port=0, state_dir=folder, enrolment_token_file=token_file)
    patient = chain.chain.model_copy(update={"poll_seconds": 0.2, "timeout_seconds": 5.0})
    return chain.model_copy(update={"account": account, "chain": patient})


@dataclass
class Running:
    """An account service that runs in a thread of this process."""

    url: str
    service: Service

    def node_chain(self, **changes: object) -> settings.Chain:
        """Chain settings of a node that only knows this service."""
        return settings.Chain(account_url=self.url, poll_seconds=0.1, timeout_seconds=5.0).model_copy(update=changes)

    def enrolled(self, node: Identity, folder: Path, **changes: object) -> AccountClient:
        client = AccountClient(self.node_chain(**changes), folder)
        client.enrol(node, ENROLMENT_TOKEN)
        return client


@contextmanager
def serving(parsed: settings.Settings, port: int = 0) -> Iterator[Running]:
    """The account service of these settings, on real HTTP, until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    service = Service(parsed)
    runner = web.AppRunner(service.application(), access_log=None, shutdown_timeout=1.0)

    async def start() -> asyncio.Task[None]:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return asyncio.create_task(service.tend())

    async def stop(tending: asyncio.Task[None]) -> None:
        tending.cancel()
        await asyncio.wait([tending])
        await runner.cleanup()

    tending = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield Running(f"http://127.0.0.1:{runner.addresses[0][1]}", service)
    finally:
        asyncio.run_coroutine_threadsafe(stop(tending), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


# Making RSA keys is slow: tests that do not care whose key it is share these.
_IDENTITIES: list[Identity] = []


def some_identity(folder: Path, number: int = 0) -> Identity:
    while len(_IDENTITIES) <= number:
        _IDENTITIES.append(identity.create(folder / f"shared-{len(_IDENTITIES)}.pem"))
    return _IDENTITIES[number]


@dataclass
class FaultyProxy:
    """HTTP in front of `target` that fails as `fault` says for each request: a word, or None for passing it on.

    drop: closed before it arrives. lose: it arrives, the answer does not. error: HTTP 500 before it arrives.
    twice: it arrives two times, the second answer is given. lie: a transaction hash, but nothing arrives.
    """

    target: str
    fault: Callable[[str], str | None]
    url: str = ""
    seen: list[str] = field(default_factory=list)


@contextmanager
def faulty(target: str, fault: Callable[[str], str | None]) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(target, fault)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            proxy.seen.append(self.path + " " + body.decode())
            kind = proxy.fault(proxy.seen[-1])
            if kind == "drop":
                self.close_connection = True
                return
            if kind == "error":
                self._answer(500, b'{"error":"out of order"}')
                return
            if kind == "lie":
                self._answer(200, b'{"hash": "0x' + b"11" * 32 + b'"}')
                return
            kept = {k: v for k, v in self.headers.items() if k.lower() in ("authorization", "content-type")}
            for _ in range(2 if kind == "twice" else 1):
                answer = requests.request(self.command, proxy.target + self.path, data=body, headers=kept, timeout=10)
            if kind == "lose":
                self.close_connection = True
                return
            self._answer(answer.status_code, answer.content)

        def _answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def at_random(seed: int, share: float) -> Callable[[str], str | None]:
    """A fault for `share` of the requests."""
    kinds = ("drop", "lose", "error", "twice")
    rng = random.Random(seed)
    return lambda _: rng.choice(kinds) if rng.random() < share else None


def eventually(condition: Callable[[], object], seconds: float = 45.0) -> None:
    """Wait until it holds. Fails the test if it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come to hold in time"
        time.sleep(0.05)
