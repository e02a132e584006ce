"""One round's requests: peers are drawn at random, asked, checked and, when they fail, replaced by others."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from worker.errors import BadRecord
from worker.records import ScoredGroup
from worker.swarm import wire
from worker.swarm.network import Network
from worker.swarm.serving import Serving
from worker.swarm.streams import ANSWER_TIMEOUT_SECONDS, UNREACHABLE
from worker.swarm.tally import Tally
from worker.swarm.verify import INNOCENT, Verifier
from worker.swarm.wire import Kind, OtherVersion, Refused

log = logging.getLogger(__name__)

MAX_DRAWS_PER_PEER = 3
"""Peers that are asked in a round at most, for each of `peers_per_round`: bounds what a round costs when many fail."""
MAX_WAITS = 100
RETRY_PAUSE_SECONDS = 2.0
"""Before a peer that was not reached is asked a second time, when there is nobody else and nobody was heard yet."""
LOOK_EVERY_SECONDS = 1.0
"""Also how long no more peers are asked than will do if all are ready."""
CLOSED = frozenset({"not-allowed", "environment", "version"})
"""Refusals of a peer that won't exchange groups with us as things are, this round or another."""


class Scoring:
    """The verifier in a thread of its own: one sender at a time."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self._turn = asyncio.Lock()
        self._pool = self._make_pool()

    async def open_and_verify(
        self, sealed: bytes, peer_id: str, round: int, seconds: float
    ) -> tuple[int, list[ScoredGroup], list[BadRecord]]:
        """Number of groups, those that hold, and what is wrong with the others. Raises BadRecord ("slow-to-score")."""
        loop = asyncio.get_running_loop()
        try:
            async with self._turn, asyncio.timeout(seconds):
                until = time.monotonic() + seconds
                return await loop.run_in_executor(self._pool, self._work, sealed, peer_id, round, until)
        except TimeoutError:
            # The thread ends with the group that it is at; the next sender gets a new one.
            self.close()
            self._pool = self._make_pool()
            raise BadRecord("slow-to-score", f"groups of {peer_id} take too long to score") from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _work(
        self, sealed: bytes, peer_id: str, round: int, until: float
    ) -> tuple[int, list[ScoredGroup], list[BadRecord]]:
        groups = wire.open_groups(sealed, peer_id, round, self._verifier.limits)
        scored, bad = self._verifier.verify_all(peer_id, round, groups, until)
        return len(groups), scored, bad

    @staticmethod
    def _make_pool() -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="verify")


@dataclass
class Collecting:
    """One round's requests; `run` once. `want`: groups, `deadline`: monotonic seconds, `num_peers`: k."""

    network: Network
    serving: Serving
    scoring: Scoring
    tally: Tally
    round: int
    want: int
    deadline: float
    num_peers: int
    groups: list[ScoredGroup] = field(default_factory=list)
    heard: set[str] = field(default_factory=set)
    drawn: set[str] = field(default_factory=set)
    rejected: "Counter[str]" = field(default_factory=Counter)
    _gone: list[str] = field(default_factory=list)  # peers that were not reached
    _answered: int = 0
    _tasks: "dict[asyncio.Task[None], str]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        now = time.monotonic()
        self._all_at = now + LOOK_EVERY_SECONDS
        self._hedge_at = (now + self.deadline) / 2

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
        open_requests = self._choose_number()
        while len(self._tasks) < open_requests and len(self.drawn) < MAX_DRAWS_PER_PEER * self.num_peers:
            peer_id = self.network.peers.draw(self.network.rng, self.drawn)
            if peer_id is not None:
                self.drawn.add(peer_id)
                self._tasks[asyncio.create_task(self._ask(peer_id))] = peer_id
            elif self._gone and self.heard:
                owner = self._gone.pop()
                self._tasks[asyncio.create_task(self._ask_holders(owner, self._choose(self.heard)))] = owner
            elif self._gone and self.network.peers.num_failures(self._gone[-1]) == 1:
                again = self._gone.pop()
                self._tasks[asyncio.create_task(self._ask(again, RETRY_PAUSE_SECONDS))] = again
            else:
                return

    def _choose_number(self) -> int:
        """Have k requests that were answered or may still be; in the second half of the time twice those still open. At
        first only as many as bring enough if every peer is ready and has as many groups as the last one had."""
        now, number = time.monotonic(), self.num_peers - self._answered
        if now >= self._hedge_at:
            return 2 * number
        if now < self._all_at and self.tally.groups_a_peer:
            return min(number, math.ceil((self.want - len(self.groups)) / self.tally.groups_a_peer))
        return number

    def _choose(self, peer_ids: Collection[str]) -> list[str]:
        return self.network.rng.sample(sorted(peer_ids), min(wire.MAX_HOLDERS, len(peer_ids)))

    async def _ask(self, peer_id: str, pause_seconds: float = 0.0) -> None:
        """Get the groups of a peer, from itself or, when it is full, from those that it names."""
        await asyncio.sleep(pause_seconds)
        kind, payload = await self._request(peer_id)
        if kind is Kind.GROUPS:
            await self._check(peer_id, peer_id, payload)
        elif kind is Kind.ELSEWHERE:
            holders = [self.network.learn(sealed, sender="").peer_id for sealed in wire.decode_peers(payload)]
            await self._ask_holders(peer_id, holders[: wire.MAX_HOLDERS])
        else:
            raise BadRecord("malformed", f"answer to a request for groups is {kind.name}")

    async def _ask_holders(self, owner: str, holders: Sequence[str]) -> None:
        """Get the groups of `owner` from others. Raises Refused if nobody has them."""
        peers = self.network.peers
        for holder in holders:
            if holder == self.network.identity.peer_id or not peers.is_allowed(holder) or peers.is_quarantined(holder):
                continue
            try:
                kind, payload = await self._request(holder, owner)
                if kind is not Kind.GROUPS:
                    raise BadRecord("malformed", f"answer to a request for held groups is {kind.name}")
                await self._check(owner, holder, payload)
            except BadRecord as error:
                self._blame(holder, [error])
            except (Refused, *UNREACHABLE) as error:
                log.debug("groups not held peer=%s owner=%s reason=%r", holder, owner, error)
            else:
                return
        raise Refused("full: nobody else has these groups")

    async def _request(self, peer_id: str, owner: str = "") -> tuple[Kind, bytes]:
        """The answer to a standing request for the groups of `owner` (empty: of the peer itself)."""
        patience = max(0, min(int(self.deadline - time.monotonic()), wire.MAX_PATIENCE_SECONDS))
        async with self.network.stream(peer_id) as stream:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                    await stream.send(wire.encode_ask(self.round, patience, self.network.member().sealed, owner))
                    kind, payload = await stream.receive(wire.MAX_FRAME_BYTES)
            except Refused as refusal:
                self._note_refusal(peer_id, refusal)
                raise
            self.network.peers.open(peer_id)
            self._hear(peer_id)
            num_waits = 0
            while kind is Kind.WAIT:
                num_waits += 1
                if num_waits > MAX_WAITS:
                    raise BadRecord("flood", f"{peer_id} answers nothing but WAIT")
                kind, payload = await stream.receive(wire.MAX_FRAME_BYTES)
        return kind, payload

    async def _check(self, owner: str, sender: str, sealed: bytes) -> None:
        """Decode and score; each sender gets half of the time left at most. Who hands on what does not hold is to
        blame: it checked it before."""
        patience = max(0.1, (self.deadline - time.monotonic()) / 2)
        num_fetched, scored, bad = await self.scoring.open_and_verify(sealed, owner, self.round, patience)
        self.tally.take_in(num_fetched, len(scored))
        self.groups += scored
        self.network.peers.rate(owner, sum(g.has_signal for g in scored) / max(1, num_fetched))
        if bad:
            self._blame(sender, bad)
        elif scored:
            self.serving.hold(self.round, owner, sealed)
        if scored and INNOCENT.issuperset(error.reason for error in bad):
            self.network.peers.absolve(sender)

    def _note_refusal(self, peer_id: str, refusal: Refused) -> None:
        """The peer is there. If it won't exchange with us at all, that is said once in a while."""
        self.tally.note_refusal(refusal.reason)
        if refusal.reason in CLOSED:
            self.network.peers.close(peer_id)
            if refusal.reason == "version":
                self.network.peers.speaks(peer_id, refusal.version)
            elif not self.network.said.has((peer_id, "to us", refusal.reason)):
                log.warning("request refused by peer=%s round=%d reason=%s", peer_id, self.round, refusal)
        self._hear(peer_id)

    def _hear(self, peer_id: str) -> None:
        self.heard.add(peer_id)
        self.network.hear(peer_id)

    def _settle(self, task: "asyncio.Task[None]", peer_id: str) -> None:
        """What a request that ended means. A request that failed makes room for another draw."""
        error, peers = task.exception(), self.network.peers
        if error is None:
            self._answered += 1
            return
        if isinstance(error, Refused):
            log.debug("request refused by peer=%s round=%d reason=%s", peer_id, self.round, error)
        elif isinstance(error, BadRecord):
            if isinstance(error, OtherVersion):
                peers.speaks(peer_id, error.version)
            peers.rate(peer_id, 0.0)
            self._blame(peer_id, [error])
        elif isinstance(error, UNREACHABLE):
            peers.failed(peer_id)
            self._gone.append(peer_id)
            log.debug("peer not reached peer=%s round=%d reason=%r", peer_id, self.round, error)
        else:
            log.error("request failed peer=%s round=%d", peer_id, self.round, exc_info=error)

    def _blame(self, peer_id: str, errors: Sequence[BadRecord]) -> None:
        """Count what does not hold, say it in one line, and ask a sender that keeps lying no longer."""
        reasons = Counter(error.reason for error in errors)
        self.rejected.update(reasons)
        for error in errors:
            self.tally.reject(peer_id, error.reason)
        named = ",".join(f"{reason}:{count}" for reason, count in sorted(reasons.items()))
        log.warning("groups rejected peer=%s round=%d reasons=%s: %s", peer_id, self.round, named, errors[0])
        if not INNOCENT.issuperset(reasons) and (seconds := self.network.peers.strike(peer_id)):
            log.warning("peer quarantined peer=%s seconds=%d", peer_id, seconds)
