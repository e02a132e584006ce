"""Offer our weights to peers, and fetch theirs, in checked pieces over bounded streams.

The content of a fetched file is untrusted, and nothing here interprets it; worker/adoption.py
checks the weights and tries them. After an interruption or a restart, a transfer continues with the
next piece if the peer still offers the same file.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachetools import FIFOCache

from worker.errors import BadRecord
from worker.swarm.context import SwarmContext
from worker.swarm.protocol import messages, weight_messages
from worker.swarm.protocol.messages import MAX_PIECES, PIECE_BYTES, Kind, Refused
from worker.swarm.protocol.weight_messages import Offer, WeightRequest
from worker.swarm.transport.connections import Connections
from worker.swarm.transport.streams import ANSWER_TIMEOUT_SECONDS, UNREACHABLE, Stream

log = logging.getLogger(__name__)

MAX_TAKERS = 2
"""Number of concurrent transfers to peers; further peers are refused as "full"."""
MAX_TIMES_SERVED = 3
"""How often a peer may get the same file, counted in pieces."""
MAX_SERVED_REMEMBERED = 4096
PIECE_SECONDS = 30.0
"""Time for one piece to arrive or to be read by the peer: at least 35 KB/s."""
MIN_BYTES_PER_SECOND = 64 << 10
"""Minimum speed of a whole transfer; with a slower peer it is abandoned."""
MAX_PARTS_KEPT = 2
"""Number of incomplete files of other transfers to keep."""
MAX_ATTEMPTS = 3
"""Number of streams of one transfer that may end without a new piece."""


@dataclass(frozen=True, slots=True)
class Offered:
    """Our weights: `file` does not change while it is offered. `model`: digest of the model."""

    model: bytes
    file: Path
    offer: Offer


def describe(
    model: bytes,
    file: Path,
    rounds_trained: int,
) -> Offered | None:
    """Return a file as an offer; None if it is larger than any peer accepts. Raises OSError."""
    num_bytes = file.stat().st_size
    if not 0 < num_bytes <= MAX_PIECES * PIECE_BYTES:
        return None
    with file.open("rb") as stream:
        pieces = weight_messages.digests_of(list(iter(lambda: stream.read(PIECE_BYTES), b"")))
    return Offered(model, file, Offer(num_bytes, rounds_trained, pieces))


class WeightServing:
    """Our offer, and the answers to requests for it. Only used in the network's event loop."""

    def __init__(self, context: SwarmContext) -> None:
        self._context = context
        self._offered: Offered | None = None
        self._takers: set[str] = set()
        self._num_served: FIFOCache[tuple[str, bytes], int] = FIFOCache(MAX_SERVED_REMEMBERED)

    @property
    def is_busy(self) -> bool:
        return bool(self._takers)

    def put(self, offered: Offered) -> None:
        """Offer these weights from now on, in the place of earlier ones."""
        self._offered = offered

    async def answer(
        self,
        peer_id: str,
        request: WeightRequest,
        stream: Stream,
    ) -> None:
        """Answer a request with our offer, with its pieces, or with a refusal."""
        context, offered = self._context, self._offered
        if not context.peers.is_allowed(peer_id):
            await context.refuse(peer_id, stream, "not-allowed", context.peers.whom_allowed)
        elif not context.swarm.shares_weights:
            await stream.refuse("no-weights", "swarm.weights is off here")
        elif offered is None or offered.model != request.model:
            await stream.refuse("no-weights", "no weights of that model here, or none yet")
        elif request.offer is None:
            async with asyncio.timeout(PIECE_SECONDS):
                await stream.send(weight_messages.encode_offer(offered.offer))
        elif request.offer != offered.offer.digest:
            await stream.refuse("replaced", "newer weights are offered now; ask for the offer")
        elif peer_id in self._takers or len(self._takers) >= MAX_TAKERS:
            await context.refuse(peer_id, stream, "full", "weights are being sent; ask later")
        else:
            await self._send(peer_id, offered, request.first, stream)

    async def _send(
        self,
        peer_id: str,
        offered: Offered,
        first: int,
        stream: Stream,
    ) -> None:
        key = peer_id, offered.offer.digest
        num_pieces = len(offered.offer.pieces)
        self._takers.add(peer_id)
        try:
            for number in range(first, num_pieces):
                num_served = self._num_served.get(key, 0) + 1
                if num_served > MAX_TIMES_SERVED * num_pieces:
                    explanation = f"you were sent these weights {MAX_TIMES_SERVED} times"
                    await self._context.refuse(peer_id, stream, "flood", explanation)
                    return
                self._num_served[key] = num_served
                piece = await asyncio.to_thread(read_piece, offered.file, number)
                async with asyncio.timeout(PIECE_SECONDS):
                    await stream.send(messages.encode_frame(Kind.PIECE, piece))
            log.info("weights sent peer=%s bytes=%d", peer_id, offered.offer.num_bytes)
        finally:
            self._takers.discard(peer_id)


def read_piece(file: Path, number: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(number * PIECE_BYTES)
        return stream.read(PIECE_BYTES)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A peer's weights in `file`, as it sent them: untrusted."""

    peer_id: str
    file: Path
    rounds_trained: int
    seconds: float
    num_bytes: int


class Fetching:
    """Fetches weights of `model`, of at most `max_bytes`, into `folder`."""

    def __init__(
        self,
        context: SwarmContext,
        connections: Connections,
        model: bytes,
        max_bytes: int,
        folder: Path,
    ) -> None:
        self._context = context
        self._connections = connections
        self._model = model
        self._max_bytes = max_bytes
        self._folder = folder

    async def fetch(self, peer_id: str) -> Fetched:
        """Return a peer's weights.

        Raises Refused, BadRecord for an invalid answer, or what is in streams.UNREACHABLE.
        """
        started = time.monotonic()
        offer = await self._look(peer_id)
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{offer.digest.hex()[:32]}.part"
        await asyncio.to_thread(self._sweep, file)
        num_done = await asyncio.to_thread(self._resume, offer, file)
        async with asyncio.timeout(PIECE_SECONDS + offer.num_bytes / MIN_BYTES_PER_SECOND):
            await self._complete(peer_id, offer, file, num_done)
        seconds = time.monotonic() - started
        return Fetched(peer_id, file, offer.rounds_trained, seconds, offer.num_bytes)

    async def _complete(
        self,
        peer_id: str,
        offer: Offer,
        file: Path,
        num_done: int,
    ) -> None:
        """Fetch the missing pieces; if a stream breaks off, continue with another."""
        num_failed = 0
        while num_done < len(offer.pieces):
            before = num_done
            try:
                num_done = await self._fetch_from(peer_id, offer, file, num_done)
            except UNREACHABLE as error:
                num_done = await asyncio.to_thread(self._resume, offer, file)
                num_failed = num_failed + 1 if num_done == before else 0
                if num_failed >= MAX_ATTEMPTS:
                    raise
                log.debug("weights broke off peer=%s piece=%d: %r", peer_id, num_done, error)
                await asyncio.sleep(ANSWER_TIMEOUT_SECONDS * num_failed)

    def _sweep(self, wanted: Path) -> None:
        """Remove all but the newest incomplete files of other transfers, to limit their number."""
        others = [path for path in self._folder.glob("*.part") if path != wanted]
        others.sort(key=lambda path: path.stat().st_mtime)
        for old in others[:-MAX_PARTS_KEPT]:
            old.unlink()

    async def _look(self, peer_id: str) -> Offer:
        request = WeightRequest(self._context.member().sealed, self._model)
        async with asyncio.timeout(PIECE_SECONDS), self._connections.stream(peer_id) as stream:
            kind, payload = await stream.ask(
                weight_messages.encode_request(request), messages.MAX_FRAME_BYTES
            )
        if kind is not Kind.OFFER:
            raise BadRecord("malformed", f"answer to a request for weights is {kind.name}")
        offer = weight_messages.decode_offer(payload)
        if offer.num_bytes > self._max_bytes:
            explanation = f"weights of {offer.num_bytes} bytes; expected {self._max_bytes} at most"
            raise BadRecord("too-large", explanation)
        return offer

    def _resume(self, offer: Offer, file: Path) -> int:
        """Return the number of complete, valid pieces in the file; cut the file after them."""
        num_whole = 0
        if not file.exists():
            return 0
        with file.open("r+b") as stream:
            for number, digest in enumerate(offer.pieces):
                piece = stream.read(offer.size_of(number))
                if hashlib.sha256(piece).digest() != digest:
                    break
                num_whole += 1
            stream.truncate(min(num_whole * PIECE_BYTES, offer.num_bytes))
        return num_whole

    async def _fetch_from(
        self,
        peer_id: str,
        offer: Offer,
        file: Path,
        first: int,
    ) -> int:
        """Append pieces, from number `first` on, to the file; return the number of pieces in it."""
        request = WeightRequest(self._context.member().sealed, self._model, offer.digest, first)
        async with self._connections.stream(peer_id) as stream:
            with file.open("ab") as out:
                for number in range(first, len(offer.pieces)):
                    async with asyncio.timeout(PIECE_SECONDS):
                        if number == first:
                            await stream.send(weight_messages.encode_request(request))
                        kind, piece = await stream.receive(messages.MAX_FRAME_BYTES)
                    _check_piece(offer, number, kind, piece)
                    await asyncio.to_thread(_append, out.fileno(), piece)
        return len(offer.pieces)


def _check_piece(
    offer: Offer,
    number: int,
    kind: Kind,
    piece: bytes,
) -> None:
    if kind is not Kind.PIECE or hashlib.sha256(piece).digest() != offer.pieces[number]:
        raise BadRecord("digest", f"piece {number} of the weights is not the one that was offered")


def _append(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


class WeightTaking:
    """Transfers in the background, one peer after the other.

    The node's thread calls `expect`, `is_running` and `take`, the event loop the rest.
    `note(peer_id, reason)` counts a peer that broke the protocol.
    """

    def __init__(
        self,
        note: Callable[[str, str], None],
    ) -> None:
        self._note = note
        self._task: asyncio.Task[None] | None = None  # a reference, or it may be collected
        self._fetched: list[Fetched] = []
        self.is_running = False

    def expect(self) -> None:
        """Note that `start` will be called."""
        self.is_running = True

    def start(
        self,
        fetching: Fetching,
        peer_ids: Sequence[str],
    ) -> None:
        self._task = asyncio.create_task(self._run(fetching, peer_ids))

    def take(self) -> list[Fetched]:
        """Return the weights that have arrived since the last call."""
        fetched, self._fetched = self._fetched, []
        return fetched

    async def _run(
        self,
        fetching: Fetching,
        peer_ids: Sequence[str],
    ) -> None:
        try:
            for peer_id in peer_ids:
                await self._fetch(fetching, peer_id)
        finally:
            self.is_running = False

    async def _fetch(self, fetching: Fetching, peer_id: str) -> None:
        try:
            fetched = await fetching.fetch(peer_id)
        except BadRecord as error:
            self._note(peer_id, error.reason)
            log.warning("weights refused peer=%s reason=%s", peer_id, error)
        except (Refused, *UNREACHABLE) as error:
            log.info("weights not fetched peer=%s reason=%r", peer_id, error)
        else:
            self._fetched.append(fetched)
            log.info(
                "weights fetched peer=%s bytes=%d seconds=%.1f",
                peer_id,
                fetched.num_bytes,
                fetched.seconds,
            )
