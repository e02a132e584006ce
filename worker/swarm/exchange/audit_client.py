"""A client for auditors: requests signed groups from members without being a member.

Its key earns nothing, so it creates the key itself. It has no groups, is never drawn as a peer, and
can't be distinguished from any other untrusted peer.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from worker import settings
from worker.errors import BadRecord, SwarmError
from worker.swarm import identity
from worker.swarm.context import SwarmContext
from worker.swarm.network import Network
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Kind, Refused
from worker.swarm.transport.streams import ANSWER_TIMEOUT_SECONDS, UNREACHABLE

_KEY_FILE = "auditor.pem"
_LOOK_SECONDS = 0.2
_FETCH_SECONDS = 30.0
_PEER_SECONDS = 30.0
"""Seconds to wait until one peer is found; all peers of a swarm are found at about that time."""


class Listener:
    """Requests groups from peers, within `timeout_seconds` in total. Its state is in `folder`."""

    def __init__(
        self,
        swarm: settings.Swarm,
        folder: Path,
        timeout_seconds: float,
    ) -> None:
        key_file = folder / _KEY_FILE
        if not key_file.exists():
            identity.create(key_file)
        # A worker may run with the same settings: use any port, and announce no address.
        unannounced = swarm.model_copy(update={"port": 0, "announce": ()})
        self._context = SwarmContext(unannounced, key_file, folder, is_member=False)
        self._network = Network(self._context)
        self._deadline = time.monotonic() + timeout_seconds
        self._lost: set[str] = set()

    def __enter__(self) -> "Listener":
        self._network.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._network.close()

    def join_through(self, multiaddrs: Sequence[str]) -> None:
        """Add bootnodes, such as those that the chain names."""
        self._network.join_through(multiaddrs)

    def find(self, peer_id: str, digest: str) -> bytes:
        """Return the peer's signed groups with this digest. Raises SwarmError if that fails."""
        self._await_peer(peer_id)
        return self._network.call(self._fetch(peer_id, digest), _FETCH_SECONDS + 5)

    def _await_peer(self, peer_id: str) -> None:
        deadline = min(
            self._deadline, time.monotonic() + (0.0 if peer_id in self._lost else _PEER_SECONDS)
        )
        while not self._context.peers.knows(peer_id):
            if time.monotonic() > deadline:
                self._lost.add(peer_id)
                raise SwarmError("the peer was not found in the swarm")
            time.sleep(_LOOK_SECONDS)

    async def _fetch(self, peer_id: str, digest: str) -> bytes:
        try:
            connections = self._network.connections
            async with asyncio.timeout(_FETCH_SECONDS), connections.stream(peer_id) as stream:
                async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                    await stream.send(messages.encode_audit(digest))
                kind, payload = await stream.receive(messages.MAX_FRAME_BYTES)
        except Refused as refusal:
            raise SwarmError(f"the peer refuses: {refusal}") from None
        except BadRecord as error:
            raise SwarmError(f"the peer's answer is invalid: {error}") from None
        except UNREACHABLE as error:
            raise SwarmError(f"the peer was not reached: {error or type(error).__name__}") from None
        if kind is not Kind.GROUPS:
            raise SwarmError(f"the peer answers with {kind.name}")
        return payload
