"""The account service in a thread, and other helpers that several test files share."""

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults import at_random as at_random
from benchmarks.faults import faulty as faulty
from worker import settings
from worker.account.server import Service
from worker.chain.account_client import AccountClient
from worker.chain.enrolment_proof import message, purpose_of_enrolment
from worker.runtime import webguard, webservice
from worker.swarm import identity
from worker.swarm.identity import Identity

ENROLMENT_TOKEN = "let me in"


def account_settings(chain: settings.Settings, folder: Path) -> settings.Settings:
    """Return settings of an account service for the chain of `chain`, with state in `folder`."""
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
        """Return chain settings of a node that knows only this service."""
        return settings.Chain(
            account_url=self.url, poll_seconds=0.1, timeout_seconds=5.0
        ).model_copy(update=changes)

    def token_of(self, peer_id: str) -> str:
        return self.service.accounts._operator_tokens.issue(peer_id)

    def enrol_body(self, node: Identity, token: str = ENROLMENT_TOKEN) -> dict[str, str]:
        """Return what a node sends to enrol: good once."""
        challenge = AccountClient(self.node_chain(), Path("/nowhere")).challenge()
        signature = node.sign(message(node.peer_id, purpose_of_enrolment(token), challenge))
        return {
            "peerId": node.peer_id,
            "publicKey": base64.b64encode(node.public_key).decode(),
            "signature": base64.b64encode(signature).decode(),
            "token": token,
            "challenge": challenge.text,
        }

    def enrolled(self, node: Identity, folder: Path, **changes: object) -> AccountClient:
        client = AccountClient(self.node_chain(**changes), folder)
        client.enrol(node, ENROLMENT_TOKEN)
        return client


@contextmanager
def serving(parsed: settings.Settings, port: int = 0) -> Iterator[Running]:
    """Run the account service with these settings over HTTP until the block ends."""
    service = Service(parsed)
    with serving_role(service, port) as url:
        yield Running(url, service)


@contextmanager
def serving_role(service: webservice.Service, port: int = 0) -> Iterator[str]:
    """Run a service over HTTP until the block ends; yield its URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    listening = socket.create_server(("127.0.0.1", port))

    async def start() -> tuple[asyncio.Task[None], Callable[[], Awaitable[None]]]:
        end = await webguard.serve(service.application(), [listening])
        return asyncio.create_task(service.tend()), end

    async def stop(tending: asyncio.Task[None], end: Callable[[], Awaitable[None]]) -> None:
        tending.cancel()
        await asyncio.wait([tending])
        await end()

    started = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(*started), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


# Making RSA keys is slow: tests that do not care whose key it is share these.
_IDENTITIES: list[Identity] = []


def some_identity(folder: Path, number: int = 0) -> Identity:
    while len(_IDENTITIES) <= number:
        _IDENTITIES.append(identity.create(folder / f"shared-{len(_IDENTITIES)}.pem"))
    return _IDENTITIES[number]


def eventually(condition: Callable[[], object], seconds: float = 45.0) -> None:
    """Wait until the condition is true; fail the test if it does not become so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come to hold in time"
        time.sleep(0.05)
