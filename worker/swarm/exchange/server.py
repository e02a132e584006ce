"""Serve groups to the peers that ask for them: our own, and verified ones of other peers.

A peer gets the newest groups that match its request, immediately if there are any.

If many peers ask at once, the node serves a limited number of them, and names to the rest other
peers that hold its groups. Groups are signed by their owner, so any peer may relay them.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from cachetools import FIFOCache

from worker.records import Place
from worker.swarm.context import SwarmContext
from worker.swarm.exchange.archive import Archive
from worker.swarm.protocol import messages
from worker.swarm.status import Tally
from worker.swarm.transport.streams import ANSWER_TIMEOUT_SECONDS, Stream

log = logging.getLogger(__name__)

MAX_BYTES_HELD = 16 << 20
"""Bytes of other peers' groups to keep, all rounds together."""
MAX_HOLDERS_KNOWN = 16
MAX_ROUNDS_AHEAD = 100
"""A request for a round further ahead of ours is refused: it would wait in vain."""
MAX_TIMES_SERVED = 3
"""How often a peer may get the same groups: it may be killed before it has trained on them."""
MAX_SERVED_REMEMBERED = 4096


@dataclass
class _Published:
    """Our groups of a part of a round, as a frame, and the peers that got them last."""

    frame: bytes
    num_groups: int
    holders: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_HOLDERS_KNOWN))


class Serving:
    """The groups that peers can get. Only used in the network's event loop."""

    def __init__(
        self,
        context: SwarmContext,
        tally: Tally,
        archive: Archive,
    ) -> None:
        self._context = context
        self._swarm = context.swarm
        self._tally = tally
        self._archive = archive
        self._ours: dict[Place, _Published] = {}
        self._held: dict[tuple[Place, str], bytes] = {}  # place, owner -> GROUPS frame
        self._published = asyncio.Event()
        self._asking: dict[str, asyncio.Task[None]] = {}  # the peers being served, one request each
        # By place, owner and asker.
        self._num_served: FIFOCache[tuple[Place, str, str], int] = FIFOCache(MAX_SERVED_REMEMBERED)

    def put(
        self,
        place: Place,
        frame: bytes,
        num_groups: int,
    ) -> None:
        """Serve our groups of a part of a round.

        The groups of the oldest rounds are dropped, and those of further parts except the newest.
        """
        self._ours[place] = _Published(frame, num_groups)
        newest = max(self._ours)
        first = sorted({place.round for place in self._ours})[-self._swarm.keep_rounds :][0]
        for old in list(self._ours):
            if old.round < first or (old.part and old != newest):
                del self._ours[old]
        oldest = min(self._ours)
        self._held = {key: frame for key, frame in self._held.items() if key[0] >= oldest}
        for key in [key for key in self._num_served if key[0] < oldest]:
            del self._num_served[key]
        self._context.newest_round = newest.round
        self._published.set()
        self._published = asyncio.Event()

    def hold(
        self,
        place: Place,
        owner: str,
        sealed: bytes,
    ) -> None:
        """Keep another peer's valid groups for peers that can't get them from their owner."""
        for other, name in list(self._held):
            if name == owner and other.part and other < place:
                del self._held[other, name]
        num_bytes = sum(map(len, self._held.values()))
        if num_bytes + len(sealed) <= MAX_BYTES_HELD:
            self._held[place, owner] = messages.encode_frame(messages.Kind.GROUPS, sealed)

    async def answer(
        self,
        peer_id: str,
        ask: messages.Ask,
        stream: Stream,
    ) -> None:
        """Answer a peer's standing request with groups as soon as they are ready, or refuse it."""
        context = self._context
        owner = ask.owner or context.identity.peer_id
        if not context.peers.is_allowed(peer_id):
            await context.refuse(peer_id, stream, "not-allowed", context.peers.whom_allowed)
        elif not context.peers.is_understood(peer_id):
            ours = ", ".join(context.own_record.environments)
            explanation = f"this node has {ours}, yours does not; upgrade the older of the two"
            await context.refuse(peer_id, stream, "environment", explanation)
        elif owner != context.identity.peer_id:
            await self._hand_on(peer_id, ask, stream)
        elif peer_id not in self._asking and len(self._asking) >= self._swarm.max_askers:
            await self._send_elsewhere(peer_id, ask, stream)
        else:
            with self._asked_by(peer_id):
                await self._answer_in_time(peer_id, ask, stream)

    async def answer_audit(self, digest: str, stream: Stream) -> None:
        """Send the groups with this digest, which we signed and submitted to the chain."""
        sealed = self._archive.find(digest)
        if sealed is None:
            await stream.refuse(
                "not-kept", f"no groups {digest} here; {self._swarm.audit_rounds} rounds are kept"
            )
            return
        async with asyncio.timeout(2 * ANSWER_TIMEOUT_SECONDS):
            await stream.send(messages.encode_frame(messages.Kind.GROUPS, sealed))

    async def _answer_in_time(
        self,
        peer_id: str,
        ask: messages.Ask,
        stream: Stream,
    ) -> None:
        patience = min(ask.patience, self._swarm.collect_timeout_seconds)
        async with asyncio.timeout(patience + 2 * ANSWER_TIMEOUT_SECONDS):
            if 0 <= self._context.newest_round < ask.oldest.round - MAX_ROUNDS_AHEAD:
                explanation = (
                    f"round {ask.oldest.round} is far ahead of {self._context.newest_round}"
                )
                await stream.refuse("not-ready", explanation)
                return
            if self._may_come(ask):
                await stream.send(messages.encode_frame(messages.Kind.WAIT, b""))
                if not await self._wait_for_groups(ask, patience, stream):
                    return
            place = self._find(ask)
            if place is None:
                reason = "skipped" if ask.round < self._context.newest_round else "not-ready"
                await stream.refuse(reason, f"no groups of round {ask.round} here")
                return
            published = self._ours[place]
            me = self._context.identity.peer_id
            if await self._serve(peer_id, me, place, published.frame, stream):
                published.holders.append(peer_id)
                self._tally.groups["offered"] += published.num_groups

    def _find(self, ask: messages.Ask) -> Place | None:
        """Return our newest place that matches the request; None if no place matches yet."""
        return max(filter(ask.covers, self._ours), default=None)

    def _may_come(self, ask: messages.Ask) -> bool:
        """Return whether no groups match the request yet, but some may do so later."""
        return self._find(ask) is None and self._context.newest_round <= ask.round

    async def _serve(
        self,
        peer_id: str,
        owner: str,
        place: Place,
        frame: bytes,
        stream: Stream,
    ) -> bool:
        """Send groups; return False if the peer got them too often and was refused."""
        key = place, owner, peer_id
        num_served = self._num_served.get(key, 0)
        if num_served >= MAX_TIMES_SERVED:
            explanation = (
                f"you were given these groups of round {place.round} {MAX_TIMES_SERVED} times"
            )
            await self._context.refuse(peer_id, stream, "flood", explanation)
            return False
        await stream.send(frame)
        self._num_served[key] = num_served + 1
        log.debug("groups served peer=%s round=%d part=%d", peer_id, *place)
        return True

    async def _hand_on(
        self,
        peer_id: str,
        ask: messages.Ask,
        stream: Stream,
    ) -> None:
        held = [place for place, owner in self._held if owner == ask.owner and ask.covers(place)]
        async with asyncio.timeout(2 * ANSWER_TIMEOUT_SECONDS):
            if not held:
                await stream.refuse(
                    "not-held", f"no groups of {ask.owner} in round {ask.round} here"
                )
                return
            frame = self._held[max(held), ask.owner]
            if await self._serve(peer_id, ask.owner, max(held), frame, stream):
                self._tally.groups["handed-on"] += 1

    async def _send_elsewhere(
        self,
        peer_id: str,
        ask: messages.Ask,
        stream: Stream,
    ) -> None:
        """Name the peers that got our groups last, because all our places are taken."""
        place, context = self._find(ask), self._context
        holders = self._ours[place].holders if place is not None else ()
        newest_first = dict.fromkeys(reversed(holders))
        records = []
        for holder in newest_first:
            record = context.peers.record(holder)
            if holder != peer_id and record is not None:
                records.append(record)
        if not records:
            full = f"{len(self._asking)} peers are being served; ask another peer"
            await context.refuse(peer_id, stream, "full", full)
            return
        context.refused["elsewhere"] += 1
        async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
            await stream.send(messages.encode_elsewhere(records))

    @contextlib.contextmanager
    def _asked_by(self, peer_id: str) -> Iterator[None]:
        """Occupy a place among the served peers during the block; end the peer's older request."""
        this = asyncio.current_task()
        if this is None:
            raise RuntimeError("requests are answered in tasks")
        if (older := self._asking.pop(peer_id, None)) is not None:
            older.cancel()
        self._asking[peer_id] = this
        try:
            yield
        finally:
            if self._asking.get(peer_id) is this:
                del self._asking[peer_id]

    async def _wait_for_groups(
        self,
        ask: messages.Ask,
        patience: float,
        stream: Stream,
    ) -> bool:
        """Wait until the groups are ready, can't come any more, or `patience` seconds have passed.

        Return False if the peer has left.
        """
        deadline = time.monotonic() + patience
        gone = asyncio.create_task(stream.wait_closed())
        try:
            while self._may_come(ask) and (left := deadline - time.monotonic()) > 0:
                published = asyncio.create_task(self._published.wait())
                try:
                    await asyncio.wait(
                        {published, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    published.cancel()
                if gone.done():
                    return False
            return True
        finally:
            gone.cancel()
            await asyncio.wait({gone})  # a stream can have only one reader
