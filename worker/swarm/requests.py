"""Answer the requests of peers: greetings here, other requests by the exchange's handlers."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from worker.errors import BadRecord
from worker.swarm.context import SwarmContext
from worker.swarm.protocol import messages, weight_messages
from worker.swarm.protocol.messages import Kind, OtherVersion, Refused
from worker.swarm.protocol.weight_messages import WeightRequest
from worker.swarm.transport.connections import Connections
from worker.swarm.transport.streams import ANSWER_TIMEOUT_SECONDS, Stream

log = logging.getLogger(__name__)

AskHandler = Callable[[str, messages.Ask, Stream], Awaitable[None]]
AuditHandler = Callable[[str, Stream], Awaitable[None]]
WeightHandler = Callable[[str, WeightRequest, Stream], Awaitable[None]]


class Requests:
    """Answers incoming streams. Without a handler, requests of that kind are refused."""

    def __init__(
        self,
        context: SwarmContext,
        connections: Connections,
        on_ask: AskHandler | None,
        on_audit: AuditHandler | None,
        on_weights: WeightHandler | None = None,
    ) -> None:
        self._context = context
        self._connections = connections
        self._on_ask = on_ask
        self._on_audit = on_audit
        self._on_weights = on_weights

    async def serve(
        self,
        peer_id: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Answer one stream of a peer, which libp2p has authenticated."""
        context, admission = self._context, self._connections.admission
        stream = Stream(reader, writer, context.traffic)
        refusal = admission.refusal(peer_id)
        try:
            if refusal is not None:
                await context.refuse(peer_id, stream, *refusal)
                return
            with admission.admitted(peer_id):
                await self._answer(peer_id, stream)
        except BadRecord as error:
            if isinstance(error, OtherVersion):
                context.peers.speaks(peer_id, error.version)
            with contextlib.suppress(OSError):
                await context.refuse(peer_id, stream, error.reason, str(error))
        except (OSError, EOFError, TimeoutError, Refused) as error:
            log.debug("request ended early peer=%s reason=%r", peer_id, error)

    async def _answer(self, peer_id: str, stream: Stream) -> None:
        async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
            kind, payload = await stream.receive(messages.MAX_REQUEST_BYTES)
        if kind is Kind.HELLO:
            await self._greet_back(peer_id, payload, stream)
        elif kind is Kind.ASK and self._on_ask is not None:
            ask = messages.decode_ask(payload)
            self._meet(ask.member, peer_id)
            await self._on_ask(peer_id, ask, stream)
        elif kind is Kind.AUDIT and self._on_audit is not None:
            await self._on_audit(messages.decode_audit(payload), stream)
        elif kind is Kind.WEIGHTS and self._on_weights is not None:
            request = weight_messages.decode_request(payload)
            self._meet(request.member, peer_id)
            await self._on_weights(peer_id, request, stream)
        else:
            raise BadRecord("malformed", f"this node does not answer {kind.name}")

    async def _greet_back(
        self,
        peer_id: str,
        sealed: bytes,
        stream: Stream,
    ) -> None:
        context = self._context
        if sealed:
            self._meet(sealed, peer_id)
        own = [context.member().sealed] if context.is_member else []
        others = context.peers.sample(context.rng, messages.MAX_PEERS - 1, exclude=peer_id)
        async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
            await stream.send(messages.encode_peers([*own, *others]))

    def _meet(self, sealed: bytes, peer_id: str) -> None:
        """Store the record that a peer sends as its own. Raises BadRecord."""
        if self._context.learn(sealed, peer_id).peer_id != peer_id:
            raise BadRecord("sender", f"{peer_id} sent the record of another peer as its own")
        self._context.hear(peer_id)
