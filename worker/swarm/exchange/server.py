"""Serve groups to the peers that ask for a round: ours, and verified ones of other peers.

A node that many ask at once serves a bounded number of them and names other holders of its groups
to the rest. Groups are signed by their owner, so it does not matter which peer relays them.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from cachetools import FIFOCache

from worker.swarm.context import SwarmContext
from worker.swarm.exchange.archive import Archive
from worker.swarm.protocol import messages
from worker.swarm.status import Tally
from worker.swarm.transport.streams import ANSWER_TIMEOUT_SECONDS, Stream

log = logging.getLogger(__name__)

MAX_BYTES_HELD = 16 << 20
"""Of other peers' groups, all rounds together."""
MAX_HOLDERS_KNOWN = 16
MAX_ROUNDS_AHEAD = 100
"""Of ours, in a request that waits for our round; we would not get there while it waits."""
MAX_TIMES_SERVED = 3
"""The same groups to the same peer: it may have been killed before it had trained on them."""
MAX_SERVED_REMEMBERED = 4096


@dataclass
class _Published:
    """Our groups of one round as a frame, and the peers that got them last."""

    frame: bytes
    num_groups: int
    holders: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_HOLDERS_KNOWN))


class Serving:
    """The groups that are ready for others. Only used in the network's event loop."""

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
        self._ours: dict[int, _Published] = {}
        self._held: dict[tuple[int, str], bytes] = {}  # round, owner -> GROUPS frame
        self._published = asyncio.Event()
        self._asking: dict[str, asyncio.Task[None]] = {}  # the askers, one request each
        # By round, owner and asker.
        self._num_served: FIFOCache[tuple[int, str, str], int] = FIFOCache(MAX_SERVED_REMEMBERED)

    def put(
        self,
        round: int,
        frame: bytes,
        num_groups: int,
    ) -> None:
        """Serve our groups of `round`; those of the oldest rounds are dropped."""
        self._ours[round] = _Published(frame, num_groups)
        for old in sorted(self._ours)[: -self._swarm.keep_rounds]:
            del self._ours[old]
        oldest = min(self._ours)
        self._held = {key: frame for key, frame in self._held.items() if key[0] >= oldest}
        for key in [key for key in self._num_served if key[0] < oldest]:
            del self._num_served[key]
        self._context.newest_round = max(self._ours)
        self._published.set()
        self._published = asyncio.Event()

    def hold(
        self,
        round: int,
        owner: str,
        sealed: bytes,
    ) -> None:
        """Keep another peer's valid groups for peers that can't get them from their owner."""
        num_bytes = sum(map(len, self._held.values()))
        if num_bytes + len(sealed) <= MAX_BYTES_HELD:
            self._held[round, owner] = messages.encode_frame(messages.Kind.GROUPS, sealed)

    async def answer(
        self,
        peer_id: str,
        ask: messages.Ask,
        stream: Stream,
    ) -> None:
        """Answer a peer's standing request with the groups, when they are ready, or a refusal."""
        context = self._context
        owner = ask.owner or context.identity.peer_id
        if not context.peers.is_allowed(peer_id):
            await context.refuse(peer_id, stream, "not-allowed", context.peers.whom_allowed)
        elif not context.peers.is_understood(peer_id):
            ours = ", ".join(context.own_record.environments)
            explanation = f"this node has {ours}, the asker does not; upgrade the older of the two"
            await context.refuse(peer_id, stream, "environment", explanation)
        elif self._num_served.get((ask.round, owner, peer_id), 0) >= MAX_TIMES_SERVED:
            explanation = (
                f"you were given these groups of round {ask.round} {MAX_TIMES_SERVED} times"
            )
            await context.refuse(peer_id, stream, "flood", explanation)
        elif owner != context.identity.peer_id:
            await self._hand_on(peer_id, ask, stream)
        elif peer_id not in self._asking and len(self._asking) >= self._swarm.max_askers:
            await self._send_elsewhere(peer_id, ask.round, stream)
        else:
            with self._asked_by(peer_id):
                await self._answer_in_time(peer_id, ask, stream)

    async def answer_audit(self, digest: str, stream: Stream) -> None:
        """Send the groups that we signed and committed to."""
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
            if 0 <= self._context.newest_round < ask.round - MAX_ROUNDS_AHEAD:
                await stream.refuse(
                    "not-ready", f"round {ask.round} is far ahead of {self._context.newest_round}"
                )
                return
            if ask.round > self._context.newest_round:
                await stream.send(messages.encode_frame(messages.Kind.WAIT, b""))
                if not await self._wait_for_groups(ask.round, patience, stream):
                    return
            published = self._ours.get(ask.round)
            if published is None:
                reason = "skipped" if ask.round < self._context.newest_round else "not-ready"
                await stream.refuse(reason, f"no groups of round {ask.round} here")
                return
            await stream.send(published.frame)
            self._note_served(ask.round, self._context.identity.peer_id, peer_id)
            published.holders.append(peer_id)
            self._tally.groups["offered"] += published.num_groups
            log.debug("groups served peer=%s round=%d", peer_id, ask.round)

    async def _hand_on(
        self,
        peer_id: str,
        ask: messages.Ask,
        stream: Stream,
    ) -> None:
        frame = self._held.get((ask.round, ask.owner))
        async with asyncio.timeout(2 * ANSWER_TIMEOUT_SECONDS):
            if frame is None:
                await stream.refuse(
                    "not-held", f"no groups of {ask.owner} in round {ask.round} here"
                )
            else:
                await stream.send(frame)
                self._note_served(ask.round, ask.owner, peer_id)
                self._tally.groups["handed-on"] += 1

    async def _send_elsewhere(
        self,
        peer_id: str,
        round: int,
        stream: Stream,
    ) -> None:
        """Name the peers that got our groups of this round last, since we are full."""
        published, context = self._ours.get(round), self._context
        newest_first = dict.fromkeys(reversed(published.holders)) if published else {}
        records = []
        for holder in newest_first:
            record = context.peers.record(holder)
            if holder != peer_id and record is not None:
                records.append(record)
        if not records:
            full = f"{len(self._asking)} peers are being served; ask somebody else"
            await context.refuse(peer_id, stream, "full", full)
            return
        context.refused["elsewhere"] += 1
        async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
            await stream.send(messages.encode_elsewhere(records))

    def _note_served(
        self,
        round: int,
        owner: str,
        asker: str,
    ) -> None:
        key = round, owner, asker
        self._num_served[key] = self._num_served.get(key, 0) + 1

    @contextlib.contextmanager
    def _asked_by(self, peer_id: str) -> Iterator[None]:
        """Occupy one of the places for askers during the block; end the peer's older request."""
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
        round: int,
        patience: float,
        stream: Stream,
    ) -> bool:
        """Wait until the groups of `round` are ready or time is up; False if the asker left."""
        deadline = time.monotonic() + patience
        gone = asyncio.create_task(stream.wait_closed())
        try:
            while round > self._context.newest_round and (left := deadline - time.monotonic()) > 0:
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
            await asyncio.wait({gone})  # until it no longer reads: the stream has one reader
