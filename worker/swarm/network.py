"""A node's connection to the swarm: one thread with an event loop and a supervised daemon.

Nothing here stops for good before `close`: a dead daemon is restarted with the same key and port, a
lost network is looked for again. Peers find each other in three ways, each of which suffices: the
DHT (dht.py), greetings (a peer that is greeted answers with records of others, and now knows the
greeter), and the addresses of the last run.
"""

import asyncio
import contextlib
import logging
import random
import re
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Sequence,
)
from pathlib import Path
from typing import Any, TypeVar

from worker import settings
from worker.errors import BadRecord, ResourceError, SwarmError
from worker.multiaddr import RELAYED
from worker.runtime.host import require_port
from worker.swarm import identity
from worker.swarm.discovery import peer_cache
from worker.swarm.discovery.dht import Membership
from worker.swarm.discovery.discovery import Lookout
from worker.swarm.discovery.peer_cache import Cache
from worker.swarm.discovery.peer_table import MAX_PEERS_CACHED, Peers
from worker.swarm.log_throttle import Lately, Rarely
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Kind, Member, OtherVersion, Refused
from worker.swarm.status import Reach
from worker.swarm.transport import relays
from worker.swarm.transport.daemon import PROTOCOL, Daemon
from worker.swarm.transport.streams import (
    ANSWER_TIMEOUT_SECONDS,
    UNREACHABLE,
    Admission,
    Stream,
    counted,
)

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECONDS = 5.0
LONGEST_RESTART_PAUSE_SECONDS = 30.0
READER_ENDS_FIRST_SECONDS = 1.0
"""Connections of a daemon that died may end this much earlier than its death is noticed."""

T = TypeVar("T")


AskHandler = Callable[[str, messages.Ask, Stream], Awaitable[None]]
AuditHandler = Callable[[str, Stream], Awaitable[None]]


class Unanswered(SwarmError):
    """The event loop, or the whole machine, is too busy to answer now."""


class Network:
    """See the module. With `is_member` False (a bootnode) the node is not drawn as a peer.

    Public attributes are read by the exchange, in the event loop; other threads may only read them.
    """

    def __init__(
        self,
        swarm: settings.Swarm,
        identity_file: Path,
        cache_dir: Path,
        on_ask: AskHandler | None = None,
        is_member: bool = True,
        environments: Sequence[str] = (),
        families: frozenset[bytes] = frozenset(),
        on_audit: AuditHandler | None = None,
    ) -> None:
        self.identity = identity.load(identity_file)
        self.swarm = swarm
        self.environments = tuple(environments)
        self.families = families
        self.peers = Peers(self.identity.peer_id, swarm, self.environments, families)
        self.is_member = is_member
        self.on_ask = on_ask
        self.on_audit = on_audit
        self.rng = random.Random()
        self.traffic: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()  # requests of others, by reason
        self.addresses: tuple[str, ...] = ()
        self.last_error: str | None = None
        self.newest_round = -1
        self.num_restarts = 0
        self.link_up = asyncio.Event()
        self.wake = asyncio.Event()  # to look for peers now
        self._identity_file = identity_file
        self._cache_file = cache_dir / "peers.json"
        self.cache = peer_cache.load(self._cache_file)
        self.bootnodes = list(swarm.bootnodes)
        self.foreign_bootnodes: set[str] = set()  # peers that answer, and not by our protocol
        self._relays_wanted = asyncio.Event()
        self._has_relays = False  # whether the present life of the daemon knows of any
        self._port = swarm.port or self.cache.port
        self._came_up = False  # whether the present life of the daemon has been of use
        self._daemon: Daemon | None = None
        self._member: Member | None = None
        self._admission = Admission()
        self.said = Rarely()
        self._said_of_twins = Lately()  # they have our key: no untrusted peer can make us say much
        self._asking: Counter[str] = Counter()  # our streams, by peer
        self._last_contact: float | None = None  # when any member spoke to us (monotonic)
        self._silent_since: float | None = None  # end of the last round in which none did
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # From other threads

    def start(self) -> None:
        """Start the background thread. Raises ResourceError if the configured port is taken."""
        require_port(self.swarm.host, self.swarm.port, "swarm.port")
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        # Not the policy's: hivemind may set that to uvloop's.
        loop = self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="swarm", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the daemon and the thread. Safe to call twice."""
        if self._thread is not None and self._thread.is_alive():
            self.post(self._stopping.set)
            self._thread.join(timeout=15)

    def post(self, action: Callable[..., object], *arguments: Any) -> None:
        """Run something in the event loop, soon. Raises SwarmError if the loop is not running."""
        if self._loop is None or self._loop.is_closed():
            raise SwarmError(
                "the swarm is not running: start() comes first, and nothing after close()"
            )
        self._loop.call_soon_threadsafe(action, *arguments)

    def call(self, work: Coroutine[Any, Any, T], timeout_seconds: float) -> T:
        """Run a coroutine in the event loop and return its result.

        Raises Unanswered after `timeout_seconds`, SwarmError if the loop is not running.
        """
        if self._loop is None or self._loop.is_closed():
            work.close()
            raise SwarmError(
                "the swarm is not running: start() comes first, and nothing after close()"
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_seconds)
        except TimeoutError:
            if future.done():  # its own
                raise
            future.cancel()
            raise Unanswered(
                f"the swarm's event loop did not answer within {timeout_seconds:g} s; it is at"
                f" {self._find_place()}"
            ) from None

    def _find_place(self) -> str:
        """Return where in the code the thread is, which is what keeps it from answering."""
        frame = (
            sys._current_frames().get(self._thread.ident or 0) if self._thread is not None else None
        )
        if frame is None:
            return "its end"
        return " > ".join(
            f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_stack(frame)[-3:]
        )

    def join_through(self, multiaddrs: Sequence[str]) -> None:
        """Add bootnodes, such as the chain's; known ones change nothing. Also before `start`."""
        self._soon(self._add_bootnodes, tuple(multiaddrs))

    def allow_registered(self, peer_ids: Collection[str]) -> None:
        """Set the peers registered on the chain, for `only_registered`. Also before `start`."""
        self._soon(self.peers.allow_registered, frozenset(peer_ids))

    def _soon(self, action: Callable[..., object], *arguments: Any) -> None:
        """Do as `post`, but at once while there is no event loop yet."""
        if self._loop is None:
            action(*arguments)
        else:
            self.post(action, *arguments)

    # In the event loop

    @property
    def is_up(self) -> bool:
        return self.link_up.is_set()

    @property
    def has_contact(self) -> bool | None:
        """Return whether a member spoke to us within a record's lifetime.

        It must also be later than the last round in which none did. None: there has been neither
        contact nor such a round yet.
        """
        if self._last_contact is None:
            return None if self._silent_since is None else False
        is_fresh = self._last_contact >= time.monotonic() - self.peers.lifetime_seconds
        return is_fresh and (self._silent_since is None or self._last_contact > self._silent_since)

    @property
    def reach(self) -> Reach:
        """Return how others can connect to this node, as far as is known."""
        if any(RELAYED in address for address in self.addresses):
            return "relay"
        if self.swarm.reachability == "public" or self.swarm.announce:
            return "direct"
        return "none" if self.swarm.reachability == "private" else "unknown"

    def fall_silent(self) -> None:
        """Record that nobody answered for a whole round; look for peers more often now."""
        self._silent_since = time.monotonic()
        self.wake.set()

    def member(self) -> Member:
        """Return our own record, fresh enough to be shown."""
        now, old = int(time.time()), self._member
        fresh_seconds = max(1, int(self.swarm.announce_every_seconds / 4))
        if (
            old is not None
            and (old.addresses, old.round)
            == (self.addresses[: messages.MAX_ADDRESSES], self.newest_round)
            and abs(now - old.issued)
            < fresh_seconds  # one that follows another within a second is ahead of time
        ):
            return old
        issued = max(now, old.issued + 1) if old else now
        expires = now + max(1, round(self.peers.lifetime_seconds))
        self._member = messages.seal_member(
            self.identity,
            self.addresses,
            self.newest_round,
            issued,
            expires,
            self.environments,
            self.families,
        )
        return self._member

    @contextlib.asynccontextmanager
    async def stream(self, peer_id: str, addresses: Sequence[str] = ()) -> AsyncIterator[Stream]:
        """Open a stream to a peer. Raises the exceptions in UNREACHABLE."""
        daemon = self._daemon
        if daemon is None:
            raise SwarmError("libp2p daemon is not running")
        try:
            reader, writer = await self._open_stream(daemon, peer_id, addresses)
        except TimeoutError:
            await self._hang_up(daemon, peer_id)
            raise
        try:
            with contextlib.closing(writer), counted(self._asking, peer_id):
                yield Stream(reader, writer, self.traffic)
        except TimeoutError:
            # A peer that is slow here may be waiting for our groups in another stream.
            if not self.is_talking_with(peer_id):
                await self._hang_up(daemon, peer_id)
            raise

    async def _hang_up(self, daemon: Daemon, peer_id: str) -> None:
        """Disconnect, so that the next attempt dials again: the connection may be dead."""
        with contextlib.suppress(SwarmError, TimeoutError):
            await daemon.disconnect(peer_id)

    async def _open_stream(
        self, daemon: Daemon, peer_id: str, addresses: Sequence[str]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a stream through the existing connection, or through a new one if that is dead.

        A new connection uses the newest addresses.
        """
        if daemon.has_met(peer_id):
            try:
                return await daemon.open_stream(peer_id, PROTOCOL, CONNECT_TIMEOUT_SECONDS)
            except SwarmError as error:
                log.debug("connecting again peer=%s reason=%s", peer_id, error)
        await daemon.connect(
            peer_id, addresses or self.peers.addresses(peer_id), CONNECT_TIMEOUT_SECONDS
        )
        return await daemon.open_stream(peer_id, PROTOCOL, CONNECT_TIMEOUT_SECONDS)

    def is_talking_with(self, peer_id: str) -> bool:
        """Return whether a stream is open, the peer's or ours."""
        return self._asking[peer_id] > 0 or self._admission.has_open(peer_id)

    def hear(self, peer_id: str) -> None:
        """Record that a member spoke to us.

        It does not count as contact if we can't learn from it, or it does not accept us.
        """
        self.peers.answered(peer_id)
        if self.peers.is_open(peer_id):
            self._last_contact = time.monotonic()

    def learn(self, sealed: bytes, sender: str) -> Member:
        """Store a record that `sender` showed. Raises BadRecord."""
        member = messages.open_member(sealed)
        if member.peer_id == self.identity.peer_id:
            self._check_twin(member)
        elif self.peers.learn(member, from_itself=member.peer_id == sender):
            log.debug("peer found peer=%s through=%s", member.peer_id, sender)
        return member

    # The life of the daemon

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(self._supervise())

    async def _supervise(self) -> None:
        failures = 0
        stopping = asyncio.create_task(self._stopping.wait())
        while not self._stopping.is_set():
            started = time.monotonic()
            self._came_up = False
            session = asyncio.create_task(self._session())
            await asyncio.wait({session, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not session.done():
                session.cancel()
                await asyncio.wait({session})
                return
            # A task within it may have been cancelled by other code: that is a failure, too.
            self._note_failure(
                SwarmError("a task was cancelled") if session.cancelled() else session.exception()
            )
            failures = (
                0 if time.monotonic() - started > LONGEST_RESTART_PAUSE_SECONDS else failures + 1
            )
            if self._came_up:  # it was killed, or the network went down: retry soon
                failures = min(failures, 2)
            pause = min(0.25 * 2**failures, LONGEST_RESTART_PAUSE_SECONDS) * self.rng.uniform(
                0.5, 1.5
            )
            await asyncio.wait({stopping}, timeout=pause)
            self.num_restarts += 1

    def _note_failure(self, error: BaseException | None) -> None:
        self.last_error = str(error)
        if isinstance(error, (*UNREACHABLE, ResourceError)):
            log.warning("network down, restarting it reason=%s", error)
        else:
            log.error("network failed, restarting it", exc_info=error)

    async def _session(self) -> None:
        """Run one life of the daemon. Ends only with an exception."""
        timeout = self.swarm.startup_timeout_seconds
        port = self._choose_port()
        # Cleared first: bootnodes that are added from now on are not among those known.
        self._relays_wanted.clear()
        known = self.swarm.relays or (*self.bootnodes, *self.cache.bootnodes)
        found = [] if self.swarm.reachability == "public" else await relays.find(known)
        self._has_relays = bool(found) or self.swarm.reachability == "public"
        daemon = await Daemon.start(self._identity_file, self.swarm, port, found)
        membership, tasks = None, []
        try:
            if daemon.peer_id != self.identity.peer_id:
                raise SwarmError(
                    f"libp2p daemon runs as {daemon.peer_id}; expected {self.identity.peer_id}"
                )
            self._daemon, self.addresses = daemon, daemon.addresses
            if not self.swarm.announce:
                self._port = _port_of(daemon.addresses)
            await daemon.serve(PROTOCOL, self._serve)
            membership = await Membership.start(daemon, timeout)
            self.link_up.set()
            self._came_up = True
            log.info("network up peer=%s addresses=%s", daemon.peer_id, ",".join(daemon.addresses))
            lookout = Lookout(self, daemon, membership)
            waits = lookout.run(), daemon.died.wait(), self._relays_wanted.wait()
            tasks = [asyncio.create_task(wait) for wait in waits]
            reader = membership.reader
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
            await tasks[0]
        finally:
            self.link_up.clear()
            self._daemon = None
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            self.save_cache()
            if membership is not None:
                await membership.close()
            await daemon.stop()

    def _choose_port(self) -> int:
        """Return the configured port, or the one of the last run if it is still free.

        p2pd itself would not notice: it shares a port in use (SO_REUSEPORT), and gets some of the
        connections.
        """
        try:
            require_port(self.swarm.host, self._port, "swarm.port")
        except ResourceError:
            if self.swarm.port:
                raise
            return 0
        return self._port

    # Being asked

    async def _serve(
        self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        stream = Stream(reader, writer, self.traffic)
        refusal = self._admission.refusal(peer_id)
        try:
            if refusal is not None:
                await self.refuse(peer_id, stream, *refusal)
                return
            with self._admission.admitted(peer_id):
                await self._answer(peer_id, stream)
        except BadRecord as error:
            if isinstance(error, OtherVersion):
                self.peers.speaks(peer_id, error.version)
            with contextlib.suppress(OSError):
                await self.refuse(peer_id, stream, error.reason, str(error))
        except (OSError, EOFError, TimeoutError, Refused) as error:
            log.debug("request ended early peer=%s reason=%r", peer_id, error)

    async def refuse(self, peer_id: str, stream: Stream, reason: str, explanation: str) -> None:
        """Tell the asker the reason, count it, and log it from time to time per peer and reason."""
        self.refused[reason] += 1
        level = logging.DEBUG if self.said.has((peer_id, reason)) else logging.WARNING
        log.log(level, "request refused peer=%s reason=%s: %s", peer_id, reason, explanation)
        await stream.refuse(reason, explanation)

    async def _answer(self, peer_id: str, stream: Stream) -> None:
        async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
            kind, payload = await stream.receive(messages.MAX_REQUEST_BYTES)
        if kind is Kind.HELLO:
            if payload:
                self._meet_sender(payload, peer_id)
            own = [self.member().sealed] if self.is_member else []
            others = self.peers.sample(self.rng, messages.MAX_PEERS - 1, exclude=peer_id)
            async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                await stream.send(messages.encode_peers([*own, *others]))
        elif kind is Kind.ASK and self.on_ask is not None:
            ask = messages.decode_ask(payload)
            self._meet_sender(ask.member, peer_id)
            await self.on_ask(peer_id, ask, stream)
        elif kind is Kind.AUDIT and self.on_audit is not None:
            await self.on_audit(messages.decode_audit(payload), stream)
        else:
            raise BadRecord("malformed", f"this node does not answer {kind.name}")

    def _meet_sender(self, sealed: bytes, peer_id: str) -> None:
        if self.learn(sealed, peer_id).peer_id != peer_id:
            raise BadRecord("sender", f"{peer_id} shows the record of another peer as its own")
        self.hear(peer_id)

    def _check_twin(self, member: Member) -> None:
        if self._member is not None and member.issued > self._member.issued + 1:
            places = ",".join(member.addresses)
            self.last_error = (
                f"identity {member.peer_id} is also used at {places}; stop one of the two nodes"
            )
            if not self._said_of_twins.has(places):
                log.warning("%s", self.last_error)

    def _add_bootnodes(self, multiaddrs: Iterable[str]) -> None:
        new = [a for a in multiaddrs if a not in self.bootnodes]
        if new:
            self.bootnodes += new
            self.wake.set()
            # Such as those of a chain that was unreachable at our start.
            if not self._has_relays and any(map(relays.is_dialable, new)):
                self._relays_wanted.set()

    def save_cache(self) -> None:
        """Save the peers heard last; if none was heard yet, those of the last run are kept."""
        peers = tuple(self.peers.multiaddrs(MAX_PEERS_CACHED)) or self.cache.peers
        bootnodes = tuple(self.bootnodes) or self.cache.bootnodes
        current = Cache(0 if self.swarm.port else self._port, peers, bootnodes)
        if current == self.cache:
            return
        self.cache = current
        try:
            peer_cache.save(self._cache_file, current)
        except OSError as error:
            log.warning("peer cache not written reason=%s", error)


def _port_of(addresses: Sequence[str]) -> int:
    match = re.search(r"/tcp/(\d+)", " ".join(addresses))
    return int(match[1]) if match else 0
