"""Streams to and from peers, through the daemon that runs now."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from worker.errors import SwarmError
from worker.swarm.transport.daemon import PROTOCOL, Daemon
from worker.swarm.transport.streams import Admission, Stream, counted

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECONDS = 5.0


class Connections:
    """Opens streams. `addresses_of` returns a peer's newest addresses; `traffic` counts bytes."""

    def __init__(
        self, addresses_of: Callable[[str], Sequence[str]], traffic: "Counter[str]"
    ) -> None:
        self.daemon: Daemon | None = None
        self.admission = Admission()
        self.traffic = traffic
        self._addresses_of = addresses_of
        self._asking: Counter[str] = Counter()  # our streams, by peer

    def is_talking_with(self, peer_id: str) -> bool:
        """Return whether a stream with the peer is open, opened by it or by us."""
        return self._asking[peer_id] > 0 or self.admission.has_open(peer_id)

    @contextlib.asynccontextmanager
    async def stream(
        self,
        peer_id: str,
        addresses: Sequence[str] = (),
    ) -> AsyncIterator[Stream]:
        """Open a stream to a peer. Raises the exceptions in streams.UNREACHABLE."""
        daemon = self.daemon
        if daemon is None:
            raise SwarmError("libp2p daemon is not running")
        try:
            reader, writer = await self._open(daemon, peer_id, addresses)
        except TimeoutError:
            await self._hang_up(daemon, peer_id)
            raise
        try:
            with contextlib.closing(writer), counted(self._asking, peer_id):
                yield Stream(reader, writer, self.traffic)
        except TimeoutError:
            # A peer that is slow in this stream may be waiting for our groups in another.
            if not self.is_talking_with(peer_id):
                await self._hang_up(daemon, peer_id)
            raise

    async def _hang_up(self, daemon: Daemon, peer_id: str) -> None:
        """Disconnect, so that the next attempt dials again: the connection may be dead."""
        with contextlib.suppress(SwarmError, TimeoutError):
            await daemon.disconnect(peer_id)

    async def _open(
        self,
        daemon: Daemon,
        peer_id: str,
        addresses: Sequence[str],
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a stream through the existing connection, or through a new one if that is dead.

        A new connection uses the newest addresses.
        """
        if daemon.has_met(peer_id):
            try:
                return await daemon.open_stream(peer_id, PROTOCOL, CONNECT_TIMEOUT_SECONDS)
            except SwarmError as error:
                log.debug("connecting again peer=%s reason=%s", peer_id, error)
        addresses = addresses or self._addresses_of(peer_id)
        await daemon.connect(peer_id, addresses, CONNECT_TIMEOUT_SECONDS)
        return await daemon.open_stream(peer_id, PROTOCOL, CONNECT_TIMEOUT_SECONDS)
