"""A node's place in the network: one thread with one event loop, a supervised daemon, and the look-out for peers.

Nothing here ever stops for good before `close`: a dead daemon is started again with the same key and port, a lost
network is looked for again. Peers find each other in three ways, each of which is enough: the DHT (dht.py), greetings
(a peer that is greeted answers with records of others, and now knows the greeter), and the addresses of the last run.
"""

import asyncio
import contextlib
import logging
import random
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from worker import settings
from worker.errors import BadRecord, ResourceError, SwarmError
from worker.resources import require_port
from worker.swarm import identity, wire
from worker.swarm.daemon import Daemon
from worker.swarm.dht import Membership
from worker.swarm.peers import MAX_PEERS_CACHED, Peers, load_cache, save_cache
from worker.swarm.streams import Admission, Stream
from worker.swarm.wire import Kind, Member, Refused

log = logging.getLogger(__name__)

PROTOCOL = "/hivewright/exchange"
CONNECT_TIMEOUT_SECONDS = 5.0
ANSWER_TIMEOUT_SECONDS = 5.0
"""For the first sign of life in a stream, and for a whole request to come in."""
FIRST_PAUSE_SECONDS = 0.5
ALONE_PAUSE_SECONDS = 10.0
LONGEST_RESTART_PAUSE_SECONDS = 30.0
NUM_GREETINGS = 8
DEAF_AFTER = 5
"""Looks around in a row in which connected peers answered our greetings but not our DHT node: then that is started
anew."""

T = TypeVar("T")
UNREACHABLE = (SwarmError, OSError, EOFError, TimeoutError)
"""What talking to a peer may end with when the peer, or our own daemon, is not there. BadRecord is to be caught
before."""


AskHandler = Callable[[str, wire.Ask, Stream], Awaitable[None]]
AuditHandler = Callable[[str, Stream], Awaitable[None]]


class Network:
    """See the module. `is_member` False (a bootnode): helps others to find each other, is not drawn as a peer.

    Public attributes are read by the exchange, in the event loop; from other threads only for a look.
    """

    def __init__(
        self,
        swarm: settings.Swarm,
        identity_file: Path,
        cache_dir: Path,
        on_ask: AskHandler | None = None,
        is_member: bool = True,
        environments: Sequence[str] = (),
        on_audit: AuditHandler | None = None,
    ) -> None:
        self.identity = identity.load(identity_file)
        self.environments = tuple(environments)
        self.lifetime_seconds = 3 * swarm.announce_every_seconds
        self.peers = Peers(self.identity.peer_id, self.lifetime_seconds, self.environments)
        self.rng = random.Random()
        self.traffic: Counter[str] = Counter()
        self.addresses: tuple[str, ...] = ()
        self.last_error: str | None = None
        self.newest_round = -1
        self.num_restarts = 0
        self.link_up = asyncio.Event()
        self._swarm = swarm
        self._identity_file = identity_file
        self._cache_file = cache_dir / "peers.json"
        self._cache = load_cache(self._cache_file)
        self._port = swarm.port or self._cache.port
        self._on_ask = on_ask
        self._on_audit = on_audit
        self._is_member = is_member
        self._bootnodes = list(swarm.bootnodes)
        self._daemon: Daemon | None = None
        self._member: Member | None = None
        self._admission = Admission()
        self._last_contact: float | None = None  # when any member spoke to us (monotonic)
        self._silent_since: float | None = None  # end of the last round in which none did
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # From other threads

    def start(self) -> None:
        """Go into the background and stay there. Raises ResourceError if the configured port is taken."""
        require_port(self._swarm.host, self._swarm.port, "swarm.port")
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        loop = self._loop = asyncio.SelectorEventLoop()  # not the policy's: hivemind may make that uvloop
        self._thread = threading.Thread(target=self._run, args=(loop,), name="swarm", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the daemon and the thread. Safe to call twice."""
        if self._thread is not None and self._thread.is_alive():
            self.post(self._stopping.set)
            self._thread.join(timeout=15)

    def post(self, action: Callable[..., object], *arguments: Any) -> None:
        """Do something in the event loop, soon. Raises SwarmError if that is not running."""
        if self._loop is None or self._loop.is_closed():
            raise SwarmError("the swarm is not running: start() comes first, and nothing after close()")
        self._loop.call_soon_threadsafe(action, *arguments)

    def call(self, work: Coroutine[Any, Any, T], timeout_seconds: float) -> T:
        """Run a coroutine in the event loop and wait for it. Raises SwarmError after `timeout_seconds`."""
        if self._loop is None or self._loop.is_closed():
            work.close()
            raise SwarmError("the swarm is not running: start() comes first, and nothing after close()")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_seconds)
        except TimeoutError:
            future.cancel()
            raise SwarmError(f"the swarm's event loop did not answer within {timeout_seconds:g} s") from None

    def join_through(self, multiaddrs: Sequence[str]) -> None:
        """More bootnodes, such as the chain's; those known already change nothing."""
        self.post(self._add_bootnodes, tuple(multiaddrs))

    # In the event loop

    @property
    def is_up(self) -> bool:
        return self.link_up.is_set()

    @property
    def has_contact(self) -> bool | None:
        """Whether a member spoke to us since the last round in which none did. None: neither has happened yet."""
        if self._last_contact is None:
            return None if self._silent_since is None else False
        return self._silent_since is None or self._last_contact > self._silent_since

    def fall_silent(self) -> None:
        """Note that nobody answered for a whole round, and look for peers now and often for a while."""
        self._silent_since = time.monotonic()
        self._wake.set()

    def member(self) -> Member:
        """Our own record, fresh enough to be shown."""
        now, old = int(time.time()), self._member
        fresh_seconds = max(1, int(self._swarm.announce_every_seconds / 4))
        if (
            old is not None
            and (old.addresses, old.round) == (self.addresses[: wire.MAX_ADDRESSES], self.newest_round)
            and 0 <= now - old.issued < fresh_seconds
        ):
            return old
        issued = max(now, old.issued + 1) if old else now
        expires = now + max(1, round(self.lifetime_seconds))
        self._member = wire.seal_member(
            self.identity, self.addresses, self.newest_round, issued, expires, self.environments
        )
        return self._member

    @contextlib.asynccontextmanager
    async def stream(self, peer_id: str, addresses: Sequence[str] = ()) -> AsyncIterator[Stream]:
        """A stream to a peer. Raises what UNREACHABLE names."""
        if self._daemon is None:
            raise SwarmError("libp2p daemon is not running")
        await self._daemon.connect(peer_id, addresses or self.peers.addresses(peer_id), CONNECT_TIMEOUT_SECONDS)
        try:
            reader, writer = await self._daemon.open_stream(peer_id, PROTOCOL, CONNECT_TIMEOUT_SECONDS)
            with contextlib.closing(writer):
                yield Stream(reader, writer, self.traffic)
        except TimeoutError:
            # The connection may be dead without anybody having said so; the next attempt dials anew.
            if self._daemon is not None:
                with contextlib.suppress(SwarmError, TimeoutError):
                    await self._daemon.disconnect(peer_id)
            raise

    def hear(self, peer_id: str) -> None:
        """Note that a member spoke to us. It is no contact if we can't learn from it."""
        self.peers.answered(peer_id)
        if self.peers.is_understood(peer_id):
            self._last_contact = time.monotonic()

    def learn(self, sealed: bytes, sender: str) -> Member:
        """Take in a record that `sender` showed. Raises BadRecord."""
        member = wire.open_member(sealed)
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
            session = asyncio.create_task(self._session())
            await asyncio.wait({session, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not session.done():
                session.cancel()
                await asyncio.wait({session})
                return
            self._note_failure(session.exception())
            failures = 0 if time.monotonic() - started > LONGEST_RESTART_PAUSE_SECONDS else failures + 1
            pause = min(0.25 * 2**failures, LONGEST_RESTART_PAUSE_SECONDS) * self.rng.uniform(0.5, 1.5)
            await asyncio.wait({stopping}, timeout=pause)
            self.num_restarts += 1

    def _note_failure(self, error: BaseException | None) -> None:
        self.last_error = str(error)
        if isinstance(error, UNREACHABLE):
            log.warning("network down, starting it again reason=%s", error)
        else:
            log.error("network failed, starting it again", exc_info=error)

    async def _session(self) -> None:
        """One life of the daemon. Ends only with an exception."""
        timeout = self._swarm.startup_timeout_seconds
        port = self._choose_port()
        daemon = await Daemon.start(self._identity_file, self._swarm.host, port, self._swarm.announce, timeout)
        membership, tasks = None, []
        try:
            if daemon.peer_id != self.identity.peer_id:
                raise SwarmError(f"libp2p daemon runs as {daemon.peer_id}; expected {self.identity.peer_id}")
            self._daemon, self.addresses = daemon, daemon.addresses
            if not self._swarm.announce:
                self._port = _port_of(daemon.addresses)
            await daemon.serve(PROTOCOL, self._serve)
            membership = await Membership.start(daemon, timeout)
            self.link_up.set()
            log.info("network up peer=%s addresses=%s", daemon.peer_id, ",".join(daemon.addresses))
            tasks = [asyncio.create_task(self._look_out(daemon, membership)), asyncio.create_task(daemon.died.wait())]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if daemon.died.is_set():
                raise SwarmError(daemon.death_notice)
            await tasks[0]
        finally:
            self.link_up.clear()
            self._daemon = None
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            self._save_cache()
            if membership is not None:
                await membership.close()
            await daemon.stop()

    def _choose_port(self) -> int:
        """The configured port, or the one of last time if it is still free.

        p2pd itself would not notice: it shares a port in use (SO_REUSEPORT), and gets some of the connections.
        """
        try:
            require_port(self._swarm.host, self._port, "swarm.port")
        except ResourceError:
            if self._swarm.port:
                raise
            return 0
        return self._port

    # Looking for peers

    async def _look_out(self, daemon: Daemon, membership: Membership) -> None:
        pause, announce_at, num_deaf = FIRST_PAUSE_SECONDS, 0.0, 0
        while True:
            had_neighbours = membership.num_neighbours > 0
            num_spoke = await self._reach_out(daemon, membership)
            num_deaf = num_deaf + 1 if num_spoke and not membership.num_neighbours else 0
            if num_deaf >= DEAF_AFTER:
                raise SwarmError(f"DHT node hears none of {num_spoke} peers that the daemon reaches")
            try:
                if time.monotonic() >= announce_at or (membership.num_neighbours and not had_neighbours):
                    await membership.look_around()
                    if self._is_member:
                        await membership.announce(self.member())
                    announce_at = time.monotonic() + self._swarm.announce_every_seconds
                for member in await membership.read(self.rng):
                    self.learn(member.sealed, sender="")
            except TimeoutError:
                log.debug("DHT gave no answer in time")
            await self._converse(self.peers.to_greet(self.rng, NUM_GREETINGS), membership)
            self._save_cache()
            longest = self._swarm.announce_every_seconds
            if not self.has_contact or not len(self.peers):
                longest = min(longest, ALONE_PAUSE_SECONDS)
            pause = FIRST_PAUSE_SECONDS if self._wake.is_set() else min(2 * pause, longest)
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause * self.rng.uniform(0.75, 1.25)):
                    await self._wake.wait()

    async def _reach_out(self, daemon: Daemon, membership: Membership) -> int:
        """Try known addresses that we have no connection with: all bootnodes while cut off, else a few, so that islands
        find together again. Returns how many answered."""
        contacts = _by_peer([*self._bootnodes, *self._cache.multiaddrs, *self.peers.multiaddrs(MAX_PEERS_CACHED)])
        contacts.pop(self.identity.peer_id, None)
        bootnodes = [p for p in _by_peer(self._bootnodes) if p in contacts]
        connected = await daemon.connected()
        missing = [p for p in contacts if p not in connected]
        if not connected:
            others = [p for p in missing if p not in bootnodes]
            targets = [*bootnodes, *self.rng.sample(others, min(NUM_GREETINGS, len(others)))]
        else:
            targets = self.rng.sample(missing, min(2, len(missing)))
            # Who was connected before it could answer a greeting; bootnodes only while there is nobody else.
            lonely = not membership.num_neighbours or not len(self.peers)
            known = [p for p in contacts if p in connected and (lonely or not self.peers.knows(p))]
            targets += [p for p in known if lonely or p not in bootnodes][:NUM_GREETINGS]
        return await self._converse(targets, membership, contacts)

    async def _converse(
        self, peer_ids: Iterable[str], membership: Membership, contacts: dict[str, list[str]] | None = None
    ) -> int:
        """Greet peers at the same time; returns how many answered."""
        greetings = [self._greet(p, (contacts or {}).get(p, ()), membership) for p in peer_ids]
        return sum(await asyncio.gather(*greetings))

    async def _greet(self, peer_id: str, addresses: Sequence[str], membership: Membership) -> bool:
        """Introduce ourselves and learn whom the peer knows. False: it was not reached or sent nonsense."""
        try:
            async with self.stream(peer_id, addresses) as stream, asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                own = self.member().sealed if self._is_member else b""
                await stream.send(wire.encode_frame(Kind.HELLO, own))
                kind, payload = await stream.receive(wire.MAX_PEERS * (wire.MAX_MEMBER_BYTES + 8))
            if kind is not Kind.PEERS:
                raise BadRecord("malformed", f"answer to a greeting is {kind.name}")
            members = [self.learn(sealed, peer_id) for sealed in wire.decode_peers(payload)]
            if any(m.peer_id == peer_id for m in members):
                self.hear(peer_id)
        except Refused as refusal:
            log.info("greeting refused peer=%s reason=%s", peer_id, refusal)
        except BadRecord as error:
            self.peers.strike(peer_id)
            log.warning("greeting answered with a bad record peer=%s reason=%s: %s", peer_id, error.reason, error)
            return False
        except UNREACHABLE as error:
            self.peers.failed(peer_id)
            log.debug("greeting failed peer=%s reason=%s", peer_id, error)
            return False
        await membership.meet(peer_id)
        return True

    # Being asked

    async def _serve(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = Stream(reader, writer, self.traffic)
        refusal = self._admission.refusal(peer_id)
        try:
            if refusal is not None:
                log.debug("request refused peer=%s reason=%s", peer_id, refusal[0])
                await stream.refuse(*refusal)
                return
            with self._admission.admitted(peer_id):
                await self._answer(peer_id, stream)
        except BadRecord as error:
            log.warning("request dropped peer=%s reason=%s: %s", peer_id, error.reason, error)
            with contextlib.suppress(OSError):
                await stream.refuse(error.reason, str(error))
        except (OSError, EOFError, TimeoutError, Refused) as error:
            log.debug("request ended early peer=%s reason=%r", peer_id, error)

    async def _answer(self, peer_id: str, stream: Stream) -> None:
        async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
            kind, payload = await stream.receive(wire.MAX_REQUEST_BYTES)
        if kind is Kind.HELLO:
            if payload:
                self._meet_sender(payload, peer_id)
            own = [self.member().sealed] if self._is_member else []
            others = self.peers.sample(self.rng, wire.MAX_PEERS - 1, exclude=peer_id)
            async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                await stream.send(wire.encode_peers([*own, *others]))
        elif kind is Kind.ASK and self._on_ask is not None:
            ask = wire.decode_ask(payload)
            self._meet_sender(ask.member, peer_id)
            await self._on_ask(peer_id, ask, stream)
        elif kind is Kind.AUDIT and self._on_audit is not None:
            await self._on_audit(wire.decode_audit(payload), stream)
        else:
            raise BadRecord("malformed", f"{kind.name} is nothing that this node answers")

    def _meet_sender(self, sealed: bytes, peer_id: str) -> None:
        if self.learn(sealed, peer_id).peer_id != peer_id:
            raise BadRecord("sender", f"{peer_id} shows the record of another peer as its own")
        self.hear(peer_id)

    def _check_twin(self, member: Member) -> None:
        if self._member is not None and member.issued > self._member.issued + 1:
            places = ",".join(member.addresses)
            self.last_error = f"identity {member.peer_id} is also used at {places}; stop one of the two"
            log.warning("%s", self.last_error)

    def _add_bootnodes(self, multiaddrs: Iterable[str]) -> None:
        new = [a for a in multiaddrs if a not in self._bootnodes]
        if new:
            self._bootnodes += new
            self._wake.set()

    def _save_cache(self) -> None:
        """Keep what was heard last; with nothing heard yet, what the last run left stays as it is."""
        multiaddrs = tuple(self.peers.multiaddrs(MAX_PEERS_CACHED)) or self._cache.multiaddrs
        port = 0 if self._swarm.port else self._port
        if (port, multiaddrs) == (self._cache.port, self._cache.multiaddrs):
            return
        self._cache = type(self._cache)(port, multiaddrs)
        try:
            save_cache(self._cache_file, port, multiaddrs)
        except OSError as error:
            log.warning("peer cache not written path=%s reason=%s", self._cache_file, error.strerror)


def _by_peer(multiaddrs: Iterable[str]) -> dict[str, list[str]]:
    """Addresses that end in /p2p/PEER, by peer and without that end; others can't be dialled and are left out."""
    contacts: dict[str, list[str]] = {}
    for multiaddr in multiaddrs:
        address, _, peer_id = multiaddr.rpartition("/p2p/")
        if address and wire.is_peer_id(peer_id):
            contacts.setdefault(peer_id, []).append(address)
    return contacts


def _port_of(addresses: Sequence[str]) -> int:
    match = re.search(r"/tcp/(\d+)", " ".join(addresses))
    return int(match[1]) if match else 0
