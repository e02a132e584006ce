"""A node's connection to the swarm: one thread with an event loop and a supervised daemon.

Nothing here stops for good before `close`: a dead daemon is restarted with the same key and port,
and a lost network is reconnected. Peers find each other in three ways, each of which suffices: the
DHT (dht.py), greetings (a greeted peer answers with records of others, and then knows the peer that
greeted it), and the addresses of the last run.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from worker.errors import ResourceError, SwarmError
from worker.runtime.host import require_port
from worker.swarm.context import SwarmContext
from worker.swarm.discovery.dht import Membership
from worker.swarm.discovery.discovery import DiscoveryLoop
from worker.swarm.event_loop import EventLoopThread
from worker.swarm.requests import AskHandler, AuditHandler, Requests, WeightHandler
from worker.swarm.transport import relays
from worker.swarm.transport.connections import Connections
from worker.swarm.transport.daemon import PROTOCOL, Daemon
from worker.swarm.transport.streams import UNREACHABLE

log = logging.getLogger(__name__)

FIRST_RESTART_PAUSE_SECONDS = 0.25
LONGEST_RESTART_PAUSE_SECONDS = 30.0
READER_ENDS_FIRST_SECONDS = 1.0
"""Connections of a daemon that died may end this many seconds before its death is noticed."""

T = TypeVar("T")


class Network:
    """The node's connection, as described above. The handlers run in its event loop."""

    def __init__(
        self,
        context: SwarmContext,
        on_ask: AskHandler | None = None,
        on_audit: AuditHandler | None = None,
        on_weights: WeightHandler | None = None,
    ) -> None:
        self.context = context
        self.connections = Connections(context.peers.addresses, context.traffic)
        self._requests = Requests(context, self.connections, on_ask, on_audit, on_weights)
        self._thread = EventLoopThread("swarm")
        self._relays_wanted = asyncio.Event()
        self._has_relays = False  # whether this run of the daemon was given relays
        self._came_up = False  # whether this run of the daemon has had contact with peers

    # From other threads

    def start(self) -> None:
        """Start the background thread. Raises ResourceError if the configured port is taken."""
        context = self.context
        require_port(context.swarm.host, context.swarm.port, "swarm.port")
        context.cache_file.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start(self._supervise)

    def close(self) -> None:
        """Stop the daemon and the thread. Safe to call twice."""
        self._thread.stop()

    def post(
        self,
        action: Callable[..., object],
        *arguments: Any,
    ) -> None:
        """Schedule a call in the event loop. Raises SwarmError if the loop is not running."""
        self._thread.post(action, *arguments)

    def call(
        self,
        work: Coroutine[Any, Any, T],
        timeout_seconds: float,
    ) -> T:
        """Run a coroutine in the event loop and return its result.

        Raises Unanswered after `timeout_seconds`, SwarmError if the loop is not running.
        """
        return self._thread.call(work, timeout_seconds)

    def join_through(self, multiaddrs: Sequence[str]) -> None:
        """Add bootnodes, such as the chain's; known ones are ignored. Works before `start` too."""
        self._thread.post_or_run(self._add_bootnodes, tuple(multiaddrs))

    def allow_registered(self, peer_ids: Collection[str]) -> None:
        """Set the peers registered on the chain (`only_registered`). Works before `start` too."""
        self._thread.post_or_run(self.context.peers.allow_registered, frozenset(peer_ids))

    # In the event loop

    async def _supervise(self) -> None:
        failures = 0
        stopping = asyncio.create_task(self._thread.stopping.wait())
        while not stopping.done():
            started = time.monotonic()
            self._came_up = False
            session = asyncio.create_task(self._session())
            await asyncio.wait({session, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not session.done():
                session.cancel()
                await asyncio.wait({session})
                return
            # Other code may have cancelled a task within it: that is a failure, too.
            self._note_failure(
                SwarmError("a task was cancelled") if session.cancelled() else session.exception()
            )
            lasted = time.monotonic() - started
            failures = 0 if lasted > LONGEST_RESTART_PAUSE_SECONDS else failures + 1
            if self._came_up:  # the daemon was killed, or the network went down: retry soon
                failures = min(failures, 2)
            await asyncio.wait({stopping}, timeout=self._choose_pause(failures))
            self.context.num_restarts += 1

    def _choose_pause(self, failures: int) -> float:
        """Return a random number of seconds until the next attempt: peers must not synchronise."""
        pause = min(FIRST_RESTART_PAUSE_SECONDS * 2.0**failures, LONGEST_RESTART_PAUSE_SECONDS)
        return pause * self.context.rng.uniform(0.5, 1.5)

    def _note_failure(self, error: BaseException | None) -> None:
        self.context.last_error = str(error)
        if isinstance(error, (*UNREACHABLE, ResourceError)):
            log.warning("network down, restarting it reason=%s", error)
        else:
            log.error("network failed, restarting it", exc_info=error)

    async def _session(self) -> None:
        """Start a daemon and use it until it fails. Ends only with an exception."""
        context = self.context
        swarm = context.swarm
        daemon = await Daemon.start(
            context.identity_file, swarm, self._choose_port(), await self._find_relays()
        )
        membership: Membership | None = None
        try:
            if daemon.peer_id != context.identity.peer_id:
                raise SwarmError(
                    f"libp2p daemon runs as {daemon.peer_id}; expected {context.identity.peer_id}"
                )
            self.connections.daemon, context.addresses = daemon, daemon.addresses
            if not swarm.announce:
                context.port = _port_of(daemon.addresses)
            await daemon.serve(PROTOCOL, self._requests.serve)
            membership = await Membership.start(daemon, swarm.startup_timeout_seconds)
            context.link_up.set()
            self._came_up = True
            log.info("network up peer=%s addresses=%s", daemon.peer_id, ",".join(daemon.addresses))
            await self._run_until_failure(daemon, membership)
        finally:
            context.link_up.clear()
            self.connections.daemon = None
            context.save_cache()
            if membership is not None:
                await membership.close()
            await daemon.stop()

    async def _run_until_failure(self, daemon: Daemon, membership: Membership) -> None:
        """Run discovery until it, the daemon or the DHT fails; raise what failed."""
        loop = DiscoveryLoop(self.context, self.connections, daemon, membership)
        looking = asyncio.create_task(loop.run())
        dying = asyncio.create_task(daemon.died.wait())
        relays_wanted = asyncio.create_task(self._relays_wanted.wait())
        tasks = looking, dying, relays_wanted
        reader = membership.reader
        try:
            await asyncio.wait({*tasks, reader}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                await asyncio.wait(
                    tasks, timeout=READER_ENDS_FIRST_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
            if daemon.died.is_set():
                raise SwarmError(daemon.death_notice)
            if reader.done():
                why = "cancelled" if reader.cancelled() else repr(reader.exception())
                raise SwarmError(f"the DHT's reader of the libp2p daemon's messages ended: {why}")
            if self._relays_wanted.is_set():
                raise SwarmError(
                    "new bootnodes that may relay; libp2p accepts relays only at its start"
                )
            await looking
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _find_relays(self) -> list[str]:
        """Return the relays for the next run of the daemon; a public node needs none."""
        context = self.context
        # Cleared first, because bootnodes that are added from now on are not used below.
        self._relays_wanted.clear()
        known = context.swarm.relays or (*context.bootnodes, *context.cache.bootnodes)
        is_public = context.swarm.reachability == "public"
        found = [] if is_public else await relays.find(known)
        self._has_relays = bool(found) or is_public
        return found

    def _choose_port(self) -> int:
        """Return the configured port, or else the one of the last run if it is still free.

        p2pd itself would not notice that a port is in use: it shares the port (SO_REUSEPORT), and
        gets only some of the connections.
        """
        swarm, port = self.context.swarm, self.context.port
        try:
            require_port(swarm.host, port, "swarm.port")
        except ResourceError:
            if swarm.port:
                raise
            return 0
        return port

    def _add_bootnodes(self, multiaddrs: Iterable[str]) -> None:
        context = self.context
        new = [address for address in multiaddrs if address not in context.bootnodes]
        if not new:
            return
        context.bootnodes += new
        context.wake.set()
        # Such as those on a chain that was unreachable when we started.
        if not self._has_relays and any(map(relays.is_dialable, new)):
            self._relays_wanted.set()


def _port_of(addresses: Sequence[str]) -> int:
    """Return the first TCP port in the addresses; 0 without one."""
    match = re.search(r"/tcp/(\d+)", " ".join(addresses))
    return int(match[1]) if match else 0
