"""The exchange of groups: ours are served to whoever asks for a round, peers' are asked for, checked and scored.

Each round a node draws a few peers at random and holds a standing request with each; what it costs does not depend on
the size of the swarm. The receiver chooses whom it listens to, so nobody can push anything into it. No peers is a state
(`training-alone`), never an error.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from worker import settings
from worker.errors import BadRecord
from worker.records import Collected, Group, ScoredGroup
from worker.swarm import wire
from worker.swarm.archive import ARCHIVE_FOLDER, Archive
from worker.swarm.network import ANSWER_TIMEOUT_SECONDS, UNREACHABLE, Network
from worker.swarm.streams import Stream
from worker.swarm.verify import INNOCENT, Verifier
from worker.swarm.wire import Kind, Refused

log = logging.getLogger(__name__)

MAX_DRAWS_PER_PEER = 3
"""Peers that are asked in a round at most, for each of `peers_per_round`: bounds what a round costs when many fail."""
MAX_WAITS = 100
LOOK_EVERY_SECONDS = 1.0
LINK_PATIENCE_SECONDS = 5.0
"""How long a round waits for a daemon that is being restarted."""
MAX_SENDERS_COUNTED = 512

State = Literal["starting", "connected", "training-alone"]


@dataclass(frozen=True, slots=True)
class SwarmStatus:
    """What the swarm part looks like from outside.

    `connected`: a peer that we can learn from spoke to us since the last round in which none did. `peers_heard`: those
    that answered in the last round. `rejected`: dropped groups and messages by reason, since the start;
    `rejected_by_peer` the same by sender. `other_versions`: how many of the known peers run which other version of an
    environment of ours.
    """

    state: State
    peer_id: str
    peers_known: int
    peers_heard: tuple[str, ...]
    rejected: dict[str, int]
    rejected_by_peer: dict[str, int]
    groups_offered: int
    groups_fetched: int
    groups_verified: int
    bytes_in: int
    bytes_out: int
    daemon_restarts: int
    other_versions: dict[str, int]
    addresses: tuple[str, ...]
    last_error: str | None


@dataclass(frozen=True, slots=True)
class Published:
    """`groups` are those of ours that peers and auditors get, `digest` (hexadecimal) that of their signed record."""

    digest: str
    groups: tuple[Group, ...]


class Swarm:
    """The swarm as the round loop sees it. Made, started, used and closed from one thread, which it never blocks for
    long."""

    def __init__(self, swarm: settings.Swarm, identity_file: Path, cache_dir: Path, verifier: Verifier) -> None:
        """Raises IdentityError if the identity is missing: it is never made here."""
        self._swarm = swarm
        self._verifier = verifier
        self._network = Network(
            swarm,
            identity_file,
            cache_dir,
            on_ask=self._serve_ask,
            environments=verifier.environments,
            on_audit=self._serve_audit,
        )
        self._archive = Archive(cache_dir / ARCHIVE_FOLDER, swarm.audit_rounds)
        self._served: dict[int, tuple[bytes, int]] = {}  # round -> GROUPS frame, number of groups
        self._published = asyncio.Event()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="verify")
        self._turn = asyncio.Lock()
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._rejected_by_peer: Counter[str] = Counter()
        self._heard: tuple[str, ...] = ()
        self._last_state: State = "starting"

    def start(self) -> None:
        """Connect in the background, again and again for ever. Raises ResourceError if the configured port is taken."""
        self._network.start()

    def join_through(self, multiaddrs: Sequence[str]) -> None:
        """Use these bootnodes too, such as those that the chain names."""
        self._network.join_through(multiaddrs)

    def publish(self, round: int, groups: Sequence[Group]) -> Published:
        """Serve our groups of `round` from now on. Groups that peers would refuse are left out, with a warning.

        On return they are on the disk, for auditors. Raises ResourceError if they can't be written.
        """
        offered = self._acceptable(round, groups)
        sealed = wire.seal_groups(self._network.identity, round, offered)
        published = Published(self._archive.put(round, sealed), tuple(offered))
        frame = wire.encode_frame(Kind.GROUPS, sealed)
        self._network.post(self._put, round, frame, len(offered))
        return published

    def collect(self, round: int, want: int) -> Collected:
        """Get and check groups of `round` from peers drawn at random. Blocks for collect_timeout_seconds at most.

        Returns as soon as `want` groups hold, or when every peer that was drawn has answered or failed; at once if no
        peers are known. `heard` names all that gave any sign of life for this round, groups or not.
        """
        if want <= 0 or self._swarm.peers_per_round == 0:
            return Collected()
        return self._network.call(self._collect(round, want), self._swarm.collect_timeout_seconds + 15)

    def status(self) -> SwarmStatus:
        network = self._network
        return SwarmStatus(
            state=self._state(),
            peer_id=network.identity.peer_id,
            peers_known=len(network.peers),
            peers_heard=self._heard,
            rejected=dict(self._rejected),
            rejected_by_peer=dict(self._rejected_by_peer),
            groups_offered=self._counts["offered"],
            groups_fetched=self._counts["fetched"],
            groups_verified=self._counts["verified"],
            bytes_in=network.traffic["in"],
            bytes_out=network.traffic["out"],
            daemon_restarts=network.num_restarts,
            other_versions=network.peers.other_versions(),
            addresses=tuple(f"{a}/p2p/{network.identity.peer_id}" for a in network.addresses),
            last_error=network.last_error,
        )

    def close(self) -> None:
        """End the daemon and the thread; takes a few seconds at most."""
        self._network.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _state(self) -> State:
        contact = self._network.has_contact
        return "starting" if contact is None else "connected" if contact else "training-alone"

    def _acceptable(self, round: int, groups: Sequence[Group]) -> list[Group]:
        limits, size = self._verifier.limits, 0
        kept: list[Group] = []
        for group in groups:
            lengths = [len(c.encode()) for c in group.completions]
            size += sum(lengths) + 64 * (len(lengths) + 4)
            fits = len(lengths) <= limits.num_completions and max(lengths, default=0) <= limits.completion_bytes
            if fits and len(kept) < limits.num_groups and size <= wire.MAX_GROUPS_BYTES // 4:
                kept.append(group)
        if len(kept) < len(groups):
            log.warning("groups not served, too large round=%d groups=%d", round, len(groups) - len(kept))
        return kept

    # In the event loop

    def _put(self, round: int, frame: bytes, num_groups: int) -> None:
        self._served[round] = frame, num_groups
        for old in sorted(self._served)[: -self._swarm.keep_rounds]:
            del self._served[old]
        self._network.newest_round = max(self._served)
        self._published.set()
        self._published = asyncio.Event()

    async def _serve_ask(self, peer_id: str, ask: wire.Ask, stream: Stream) -> None:
        """Answer a peer's standing request: at once, when the groups are ready, or with the reason why not."""
        if not self._network.peers.is_understood(peer_id):
            ours = ", ".join(self._network.environments)
            await stream.refuse("environment", f"this node has {ours}, the asker not; upgrade the older of the two")
            return
        patience = min(ask.patience, self._swarm.collect_timeout_seconds)
        async with asyncio.timeout(patience + 2 * ANSWER_TIMEOUT_SECONDS):
            await stream.send(wire.encode_frame(Kind.WAIT, b""))
            if not await self._wait_for_groups(ask.round, patience, stream):
                return
            if ask.round not in self._served:
                reason = "skipped" if ask.round < self._network.newest_round else "not-ready"
                await stream.refuse(reason, f"no groups of round {ask.round} here")
                return
            frame, num_groups = self._served[ask.round]
            await stream.send(frame)
            self._counts["offered"] += num_groups
            log.debug("groups served peer=%s round=%d", peer_id, ask.round)

    async def _serve_audit(self, digest: str, stream: Stream) -> None:
        """Give whoever asks the groups that we signed and committed to."""
        sealed = self._archive.find(digest)
        if sealed is None:
            await stream.refuse("not-kept", f"no groups {digest} here; {self._swarm.audit_rounds} rounds are kept")
            return
        async with asyncio.timeout(2 * ANSWER_TIMEOUT_SECONDS):
            await stream.send(wire.encode_frame(Kind.GROUPS, sealed))

    async def _wait_for_groups(self, round: int, patience: float, stream: Stream) -> bool:
        """Until the groups of `round` are there or won't come. False: the asker has gone."""
        deadline = time.monotonic() + patience
        gone = asyncio.create_task(stream.wait_closed())
        try:
            while round > self._network.newest_round and (left := deadline - time.monotonic()) > 0:
                published = asyncio.create_task(self._published.wait())
                await asyncio.wait({published, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                published.cancel()
                if gone.done():
                    return False
            return True
        finally:
            gone.cancel()
            await asyncio.wait({gone})  # until it no longer reads: the stream has one reader

    async def _collect(self, round: int, want: int) -> Collected:
        started = time.monotonic()
        if not self._network.is_up and self._network.num_restarts:
            await _wait_for(self._network.link_up, min(LINK_PATIENCE_SECONDS, self._swarm.collect_timeout_seconds))
        collecting = _Collecting(self, round, want, started + self._swarm.collect_timeout_seconds)
        await collecting.run()
        self._heard = tuple(sorted(collecting.heard))
        if not self._heard:
            self._network.fall_silent()
        self._log_state()
        log.info(
            "groups collected round=%d asked=%d heard=%d groups=%d rejected=%d seconds=%.1f",
            round, len(collecting.drawn), len(self._heard), len(collecting.groups), collecting.rejected.total(),
            time.monotonic() - started,
        )  # fmt: skip
        return Collected(tuple(collecting.groups), self._heard, dict(collecting.rejected))

    def _log_state(self) -> None:
        state = self._state()
        if state != self._last_state:
            level = logging.INFO if state == "connected" else logging.WARNING
            log.log(level, "swarm state=%s peers_known=%d", state, len(self._network.peers))
            self._last_state = state


@dataclass
class _Collecting:
    """One round's requests."""

    swarm: Swarm
    round: int
    want: int
    deadline: float
    groups: list[ScoredGroup] = field(default_factory=list)
    heard: set[str] = field(default_factory=set)
    drawn: set[str] = field(default_factory=set)
    rejected: "Counter[str]" = field(default_factory=Counter)
    _answered: int = 0
    _tasks: "dict[asyncio.Task[None], str]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._network = self.swarm._network
        self._k = self.swarm._swarm.peers_per_round
        self._hedge_at = (time.monotonic() + self.deadline) / 2

    async def run(self) -> None:
        try:
            while len(self.groups) < self.want and (left := self.deadline - time.monotonic()) > 0:
                self._draw()
                if not self._tasks:
                    return
                done, _ = await asyncio.wait(
                    self._tasks, timeout=min(left, LOOK_EVERY_SECONDS), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    self._settle(task, self._tasks.pop(task))
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    def _draw(self) -> None:
        """Have k requests that were answered or may still be; in the second half of the time twice those still open."""
        open_requests = self._k - self._answered
        if time.monotonic() >= self._hedge_at:
            open_requests *= 2
        while len(self._tasks) < open_requests and len(self.drawn) < MAX_DRAWS_PER_PEER * self._k:
            peer_id = self._network.peers.draw(self._network.rng, self.drawn)
            if peer_id is None:
                return
            self.drawn.add(peer_id)
            self._tasks[asyncio.create_task(self._ask(peer_id))] = peer_id

    async def _ask(self, peer_id: str) -> None:
        patience = max(0, min(int(self.deadline - time.monotonic()), wire.MAX_PATIENCE_SECONDS))
        async with self._network.stream(peer_id) as stream:
            async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                await stream.send(wire.encode_ask(self.round, patience, self._network.member().sealed))
                kind, payload = await stream.receive(wire.MAX_FRAME_BYTES)
            self._hear(peer_id)
            num_waits = 0
            while kind is Kind.WAIT:
                num_waits += 1
                if num_waits > MAX_WAITS:
                    raise BadRecord("flood", f"{peer_id} answers nothing but WAIT")
                kind, payload = await stream.receive(wire.MAX_FRAME_BYTES)
        if kind is not Kind.GROUPS:
            raise BadRecord("malformed", f"answer to a request for groups is {kind.name}")
        await self._check(peer_id, payload)

    async def _check(self, peer_id: str, sealed: bytes) -> None:
        """Decode and score in the verifier's thread: one sender at a time, each for half of the time left at most."""
        swarm, loop = self.swarm, asyncio.get_running_loop()
        patience = max(0.1, (self.deadline - time.monotonic()) / 2)
        try:
            async with swarm._turn, asyncio.timeout(patience):
                num_fetched, scored, bad = await loop.run_in_executor(
                    swarm._pool, _open_and_verify, swarm._verifier, sealed, peer_id, self.round,
                    time.monotonic() + patience,
                )  # fmt: skip
        except TimeoutError:
            # The thread ends with the group that it is at; the next sender gets a new one.
            swarm._pool.shutdown(wait=False, cancel_futures=True)
            swarm._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="verify")
            raise BadRecord("slow-to-score", f"groups of {peer_id} take too long to score") from None
        swarm._counts["fetched"] += num_fetched
        swarm._counts["verified"] += len(scored)
        self.groups += scored
        for error in bad:
            self._reject(peer_id, error)
        if any(error.reason not in INNOCENT for error in bad):
            self._strike(peer_id)
        elif scored:
            self._network.peers.absolve(peer_id)

    def _hear(self, peer_id: str) -> None:
        self.heard.add(peer_id)
        self._network.hear(peer_id)

    def _settle(self, task: "asyncio.Task[None]", peer_id: str) -> None:
        """What a request that ended means. A request that failed makes room for another draw."""
        error = task.exception()
        if error is None:
            self._answered += 1
        elif isinstance(error, Refused):
            self._hear(peer_id)
            log.log(
                logging.WARNING if error.reason in ("version", "environment") else logging.DEBUG,
                "request refused peer=%s round=%d reason=%s", peer_id, self.round, error,
            )  # fmt: skip
        elif isinstance(error, BadRecord):
            self._reject(peer_id, error)
            if error.reason not in INNOCENT:
                self._strike(peer_id)
        elif isinstance(error, UNREACHABLE):
            self._network.peers.failed(peer_id)
            log.debug("peer not reached peer=%s round=%d reason=%r", peer_id, self.round, error)
        else:
            log.error("request failed peer=%s round=%d", peer_id, self.round, exc_info=error)

    def _reject(self, peer_id: str, error: BadRecord) -> None:
        self.rejected[error.reason] += 1
        self.swarm._rejected[error.reason] += 1
        if peer_id in self.swarm._rejected_by_peer or len(self.swarm._rejected_by_peer) < MAX_SENDERS_COUNTED:
            self.swarm._rejected_by_peer[peer_id] += 1
        log.warning("group rejected peer=%s round=%d reason=%s: %s", peer_id, self.round, error.reason, error)

    def _strike(self, peer_id: str) -> None:
        seconds = self._network.peers.strike(peer_id)
        if seconds:
            log.warning("peer quarantined peer=%s seconds=%d", peer_id, seconds)


def _open_and_verify(
    verifier: Verifier, sealed: bytes, peer_id: str, round: int, until: float
) -> tuple[int, list[ScoredGroup], list[BadRecord]]:
    groups = wire.open_groups(sealed, peer_id, round, verifier.limits)
    scored, bad = verifier.verify_all(peer_id, round, groups, until)
    return len(groups), scored, bad


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        log.debug("still waiting")
