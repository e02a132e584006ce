"""A stream to a peer, and limits on the streams that untrusted peers open."""

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator

from worker.errors import SwarmError
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Kind

MAX_STREAMS = 64
MAX_STREAMS_PER_PEER = 4
MAX_REQUESTS_PER_PEER = 40
REQUEST_WINDOW_SECONDS = 10.0
MAX_PEERS_REMEMBERED = 1024
LINGER_SECONDS = 1.0
ANSWER_TIMEOUT_SECONDS = 5.0
"""Time until an answer must begin, and until a request must be complete."""
UNREACHABLE = (SwarmError, OSError, EOFError, TimeoutError)
"""Exceptions of a stream if the peer, or our own daemon, does not answer.

Catch BadRecord, which is a SwarmError, before these.
"""


class Stream:
    """One stream to or from a peer; its bytes are counted."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        traffic: Counter[str],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._traffic = traffic

    async def send(self, frame: bytes) -> None:
        self._writer.write(frame)
        self._traffic["out"] += len(frame)
        await self._writer.drain()

    async def ask(
        self,
        request: bytes,
        max_bytes: int,
    ) -> tuple[Kind, bytes]:
        """Send a request, and receive the first frame of the answer.

        It must begin within ANSWER_TIMEOUT_SECONDS; the caller bounds the time until it is
        complete.
        """
        async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS) as limit:
            await self.send(request)
            return await self.receive(max_bytes, on_begin=lambda: limit.reschedule(None))

    async def receive(
        self, max_bytes: int, on_begin: Callable[[], None] | None = None
    ) -> tuple[Kind, bytes]:
        """Receive a frame; see messages.read_frame."""
        kind, payload = await messages.read_frame(self._reader, max_bytes, on_begin)
        self._traffic["in"] += len(payload) + messages.HEADER_BYTES
        return kind, payload

    async def refuse(self, reason: str, explanation: str) -> None:
        """Send a refusal, and read what the other side is still sending.

        Closing at once would lose the refusal.
        """
        await self.send(messages.encode_refusal(reason, explanation))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while await self._reader.read(65536):
                    pass

    async def wait_closed(self) -> None:
        """Wait until the other side ends the stream (or breaks the protocol by sending more)."""
        with contextlib.suppress(OSError):
            await self._reader.read(1)


@contextlib.contextmanager
def counted(counter: "Counter[str]", key: str) -> Iterator[None]:
    """Increment a count during the block; a count of 0 is removed."""
    counter[key] += 1
    try:
        yield
    finally:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]


class Rate:
    """Limit on each peer's requests: `max_requests` within REQUEST_WINDOW_SECONDS."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._recent: dict[str, deque[float]] = {}

    def allows(self, peer_id: str) -> bool:
        """Return whether the peer may ask now; if so, count the request."""
        now = time.monotonic()
        since = now - REQUEST_WINDOW_SECONDS
        recent = self._recent.setdefault(peer_id, deque(maxlen=self._max_requests))
        if len(self._recent) > MAX_PEERS_REMEMBERED:
            active = {p: times for p, times in self._recent.items() if times and times[-1] > since}
            self._recent = {**active, peer_id: recent}
        if len(recent) == self._max_requests and recent[0] > since:
            return False
        recent.append(now)
        return True


class Admission:
    """Limits on the concurrent and successive requests of untrusted peers."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._rate = Rate(MAX_REQUESTS_PER_PEER)

    def refusal(
        self,
        peer_id: str,
    ) -> tuple[str, str] | None:
        """Return reason and explanation if this peer's next stream is refused, otherwise None."""
        if not self._rate.allows(peer_id):
            return (
                "flood",
                f"more than {MAX_REQUESTS_PER_PEER} requests in {REQUEST_WINDOW_SECONDS:g} s",
            )
        if self._open[peer_id] >= MAX_STREAMS_PER_PEER:
            return "flood", f"{MAX_STREAMS_PER_PEER} requests of yours are open; close one first"
        if self._open.total() >= MAX_STREAMS:
            return "full", f"{MAX_STREAMS} requests are open; ask another peer"
        return None

    def admitted(self, peer_id: str) -> contextlib.AbstractContextManager[None]:
        return counted(self._open, peer_id)

    def has_open(self, peer_id: str) -> bool:
        """Return whether the peer has a stream open."""
        return self._open[peer_id] > 0
