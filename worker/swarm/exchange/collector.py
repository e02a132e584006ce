"""The requests of a node: draw peers at random, ask them, verify answers, replace failed peers.

A round that waits for its peers (`run` to its end) asks only for the groups of that round. A node
that does not wait keeps its requests open while it works: it takes the groups that have arrived
(`take`), and continues to ask (`renew`) each peer for its newest groups that were not used yet.
"""

import asyncio
import logging
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from worker.errors import BadRecord
from worker.records import Collected, Place, ScoredGroup, sender_and_index
from worker.swarm.context import SwarmContext
from worker.swarm.exchange.server import Serving
from worker.swarm.exchange.verify import INNOCENT, Verifier
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Ask, Kind, OtherVersion, Refused
from worker.swarm.status import Tally
from worker.swarm.transport.connections import Connections
from worker.swarm.transport.streams import UNREACHABLE

log = logging.getLogger(__name__)

MAX_DRAWS_PER_PEER = 3
"""At most this many times `peers_per_round` peers are asked in a round, despite failures."""
MAX_WAITS = 100
RETRY_PAUSE_SECONDS = 2.0
"""Pause before an unreachable peer is asked again, if there is no other and none answered yet."""
LOOK_EVERY_SECONDS = 1.0
"""Poll interval; in the first interval only as many peers are asked as suffice if all are ready."""
OWN_SECONDS = 2.0
"""Scoring time that a sender's groups must have had before it is blamed for unscored ones."""
UNHURRIED_SECONDS = 30.0
"""Scoring time of a sender's groups if no round waits for them."""
SLOW_FACTOR = 10.0
"""A sender is blamed if its groups take this many times as long to score as usual."""
USUAL_GROUPS = 64
"""Number of groups scored last, of all senders, whose median time is the usual one."""
TO_END_SECONDS = 0.25
"""Scoring ends this long before the deadline, so that its result is used."""
CLOSED = frozenset({"not-allowed", "environment", "version"})
"""Reasons with which a peer refuses us in general, not only in this round."""


@dataclass
class Span:
    """The groups to ask for: those of rounds `first` to `last` that are newer than the used ones.

    `used`: the newest place that was used, by owner.
    """

    first: int
    last: int
    used: MutableMapping[str, Place] = field(default_factory=dict)

    def oldest(self, owner: str) -> Place:
        """Return the earliest place of `owner` that is of use."""
        used, oldest = self.used.get(owner), Place(self.first, 0)
        # A place after the last round dates from before the chain was reset to an older state.
        return oldest if used is None or used.round > self.last else max(oldest, used.after())


@dataclass
class Checked:
    """The result of one answer, filled by a thread; a partial result is used, too."""

    place: Place | None = None  # until it is decoded
    num_groups: int = 1  # until it is decoded
    scored: list[ScoredGroup] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each group in `scored`


class Scoring:
    """The verifier in its own thread, which checks one sender at a time."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self._turn = asyncio.Lock()
        self._pool = self._make_pool()
        self._usual: deque[float] = deque(maxlen=USUAL_GROUPS)

    async def open_and_verify(
        self,
        sealed: bytes,
        peer_id: str,
        ask: Ask,
        deadline: float | None,
    ) -> Checked:
        """Return the valid and the invalid groups of an answer to `ask`.

        It takes at most half of the time that is left until `deadline` (monotonic), or OWN_SECONDS
        of it; None: UNHURRIED_SECONDS. Groups that are not scored by then are invalid:
        "slow-to-score" if the sender had OWN_SECONDS and its groups take far longer than those of
        others on this machine, else "late". Raises BadRecord if `sealed` does not contain groups
        that were asked for.
        """
        async with self._turn:
            started, filling = time.monotonic(), Checked()
            seconds = UNHURRIED_SECONDS
            if deadline is not None:
                left = deadline - started - TO_END_SECONDS
                seconds = max(left / 2, min(left, OWN_SECONDS))
            work = asyncio.get_running_loop().run_in_executor(
                self._pool, self._work, filling, sealed, peer_id, ask, started + seconds
            )
            try:
                async with asyncio.timeout(seconds):
                    await work
            except TimeoutError:
                log.debug("no time left to score groups peer=%s seconds=%.1f", peer_id, seconds)
            finally:
                if work.cancelled():
                    # The thread ends after its current group; the next sender gets a new thread.
                    self.close()
                    self._pool = self._make_pool()
        checked = Checked(
            filling.place, filling.num_groups, list(filling.scored), list(filling.bad)
        )
        num_done = len(checked.scored) + len(checked.bad)
        if num_left := checked.num_groups - num_done:
            error = BadRecord("late", f"groups of {peer_id} came too late to be scored")
            if self._is_at_fault(seconds, num_done):
                error = BadRecord("slow-to-score", f"groups of {peer_id} take too long to score")
            checked.bad += [error] * num_left
        self._usual.extend(filling.seconds)
        return checked

    def _is_at_fault(self, seconds: float, num_done: int) -> bool:
        """Return whether a sender, and not this machine, made `num_done` groups take `seconds`."""
        if seconds < OWN_SECONDS or not self._usual:
            return False
        return seconds / (num_done + 1) > SLOW_FACTOR * statistics.median(self._usual)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _work(
        self,
        filling: Checked,
        sealed: bytes,
        peer_id: str,
        ask: Ask,
        until: float,
    ) -> None:
        served = messages.open_served(sealed, peer_id, self._verifier.limits)
        place, groups = served.place, served.groups
        if not ask.covers(place):
            raise BadRecord(
                "round",
                f"groups are of part {place.part} of round {place.round}; expected those of"
                f" rounds {ask.oldest.round} to {ask.round}, from part {ask.oldest.part} on",
            )
        filling.place, filling.num_groups = place, len(groups)
        began = time.monotonic()
        for result in self._verifier.verify_each(peer_id, place.round, groups, place.part):
            if isinstance(result, BadRecord):
                filling.bad.append(result)
            else:
                filling.scored.append(result)
                filling.seconds.append(time.monotonic() - began)
            began = time.monotonic()
            if began > until:
                return

    @staticmethod
    def _make_pool() -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="verify")


class _Request(NamedTuple):
    """An open request for the groups of a peer, begun at `since` (monotonic seconds)."""

    peer_id: str
    since: float


@dataclass
class Collecting:
    """The requests of a round. `run` may be called again only after `renew`.

    `round`: our round; `want`: number of groups; `deadline`: monotonic seconds; `num_peers`: k.
    `stays`: `run` continues when there is no peer left to ask, and waits for new ones. `behind`:
    number of groups by the number of rounds that they are older than ours.
    """

    context: SwarmContext
    connections: Connections
    serving: Serving
    scoring: Scoring
    tally: Tally
    round: int
    span: Span
    want: int
    deadline: float
    num_peers: int
    stays: bool = False
    groups: list[ScoredGroup] = field(default_factory=list)
    heard: set[str] = field(default_factory=set)
    drawn: set[str] = field(default_factory=set)
    rejected: "Counter[str]" = field(default_factory=Counter)
    behind: "Counter[int]" = field(default_factory=Counter)
    seconds_scoring: float = 0.0
    _judging_since: float = 0.0
    _num_judging: int = 0
    # Peers that sent invalid data; they are not asked for others' groups.
    _doubtful: set[str] = field(default_factory=set)
    _gone: list[str] = field(default_factory=list)  # peers that were not reached
    _answered: int = 0  # requests that brought at least one group
    _tasks: "dict[asyncio.Task[int], _Request]" = field(default_factory=dict)
    _told_to_wait: set[str] = field(default_factory=set)  # being sent by these peers now

    def __post_init__(self) -> None:
        self._plan()

    def _plan(self) -> None:
        now = time.monotonic()
        self._all_at = now + LOOK_EVERY_SECONDS
        self._hedge_at = (now + self.deadline) / 2

    @property
    def is_silent(self) -> bool:
        """Return whether no peer was reached since the last `take`, as far as is known now."""
        is_known = not self._tasks or bool(self._gone)
        return is_known and not any(map(self.context.peers.is_open, self.heard))

    def take(self, seconds_waiting: float = 0.0) -> Collected:
        """Return the groups that arrived since the last call; open requests stay open.

        `heard` has all peers that answered, including those that told us to wait.
        """
        # The training data must not depend on which peer was faster.
        groups = sorted(self.groups, key=sender_and_index)
        heard = tuple(sorted(self.heard))
        rejected, behind = dict(self.rejected), dict(self.behind)
        self.groups, self.heard = [], self.heard.intersection(self._asked())
        self.rejected, self.behind = Counter(), Counter()
        return Collected(tuple(groups), heard, rejected, behind, seconds_waiting)

    def renew(
        self,
        round: int,
        span: Span,
        want: int,
        deadline: float,
    ) -> None:
        """Continue to ask: peers that have answered may be drawn again, for their newer groups."""
        self.round, self.span, self.want, self.deadline = round, span, want, deadline
        self.drawn = self._asked()
        self._gone, self._answered = [], 0
        self._plan()

    def _asked(self) -> set[str]:
        return {request.peer_id for request in self._tasks.values()}

    async def run(self) -> None:
        try:
            while len(self.groups) < self.want:
                left = self.deadline - time.monotonic()
                if left > 0:
                    self._draw()
                elif not (self.stays and self._num_judging):  # no round waits: finish scoring
                    return
                pause = min(left, LOOK_EVERY_SECONDS) if left > 0 else LOOK_EVERY_SECONDS
                if not self._tasks:
                    if not self.stays:
                        return
                    await asyncio.sleep(pause)
                    continue
                done, _ = await asyncio.wait(
                    self._tasks, timeout=pause, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    self._settle(task, self._tasks.pop(task).peer_id)
        finally:
            open_tasks, self._tasks = list(self._tasks), {}
            for task in open_tasks:
                task.cancel()
            if open_tasks:
                await asyncio.wait(open_tasks)

    @contextmanager
    def _judging(self) -> Iterator[None]:
        """Count the time in the block as scoring; blocks may overlap, as answers are concurrent."""
        if self._num_judging == 0:
            self._judging_since = time.monotonic()
        self._num_judging += 1
        try:
            yield
        finally:
            self._num_judging -= 1
            if self._num_judging == 0:
                self.seconds_scoring += time.monotonic() - self._judging_since

    def _draw(self) -> None:
        """Start requests until enough are open or there is no peer left to ask.

        New peers come first, then peers that hold the groups of unreachable ones, then a second
        attempt.
        """
        peers, rng = self.context.peers, self.context.rng
        num_open = self._choose_number()
        max_drawn = MAX_DRAWS_PER_PEER * self.num_peers
        while len(self._tasks) < num_open and len(self.drawn) < max_drawn:
            peer_id = peers.draw(rng, self.drawn)
            holders = sorted(self.heard - self._doubtful)
            if peer_id is not None:
                self.drawn.add(peer_id)
                request = self._ask(peer_id)
            elif self._gone and holders:
                peer_id = self._gone.pop()
                chosen = rng.sample(holders, min(messages.MAX_HOLDERS, len(holders)))
                request = self._ask_holders(peer_id, chosen)
            elif self._gone and peers.num_failures(self._gone[-1]) == 1:
                peer_id = self._gone.pop()
                request = self._ask(peer_id, RETRY_PAUSE_SECONDS)
            else:
                return
            self._tasks[asyncio.create_task(request)] = _Request(peer_id, time.monotonic())

    def _choose_number(self) -> int:
        """Return the number of requests to have open.

        It is k minus the number of answered requests; in the second half of the time, twice that.
        At first it is not more than suffices if every peer is ready and has as many groups as the
        last one had. A node that does not wait for a round asks one more peer for each that is not
        ready or is slow, so that it finds those that are ready.
        """
        now, number = time.monotonic(), self.num_peers - self._answered
        if not self.stays and now >= self._hedge_at:
            return 2 * number
        if now < self._all_at and self.tally.groups_a_peer:
            number = min(
                number, math.ceil((self.want - len(self.groups)) / self.tally.groups_a_peer)
            )
        return number + self._count_stalled(now) if self.stays else number

    def _count_stalled(self, now: float) -> int:
        """Return the number of open requests whose peers are not ready, or too slow."""
        began_before = now - self.context.swarm.collect_timeout_seconds / 2
        return sum(
            request.peer_id in self._told_to_wait or request.since < began_before
            for request in self._tasks.values()
        )

    async def _ask(
        self,
        peer_id: str,
        pause_seconds: float = 0.0,
    ) -> int:
        """Get the groups of a peer; return how many are valid.

        They come from the peer itself or, if it is full, from the holders that it names.
        """
        await asyncio.sleep(pause_seconds)
        ask = self._make_ask(peer_id)
        kind, payload = await self._request(peer_id, ask)
        if kind is Kind.GROUPS:
            return await self._check(peer_id, peer_id, ask, payload)
        if kind is Kind.ELSEWHERE:
            named = messages.decode_peers(payload)[: messages.MAX_HOLDERS]
            holders = [self.context.learn(sealed, sender="").peer_id for sealed in named]
            return await self._ask_holders(peer_id, holders)
        raise BadRecord("malformed", f"answer to a request for groups is {kind.name}")

    async def _ask_holders(
        self,
        owner: str,
        holders: Sequence[str],
    ) -> int:
        """Get the groups of `owner` from others; return how many are valid.

        Raises Refused if none of them has any.
        """
        peers = self.context.peers
        for holder in holders:
            if (
                holder == self.context.identity.peer_id
                or not peers.is_allowed(holder)
                or peers.is_quarantined(holder)
            ):
                continue
            try:
                ask = self._make_ask(owner, is_owner=False)
                kind, payload = await self._request(holder, ask)
                if kind is not Kind.GROUPS:
                    raise BadRecord(
                        "malformed", f"answer to a request for held groups is {kind.name}"
                    )
                if num_held := await self._check(owner, holder, ask, payload):
                    return num_held
            except BadRecord as error:
                self._blame(holder, [error])
            except (Refused, *UNREACHABLE) as error:
                log.debug("groups not held peer=%s owner=%s reason=%r", holder, owner, error)
        raise Refused("full: no other peer has these groups")

    def _make_ask(
        self,
        owner: str,
        is_owner: bool = True,
    ) -> Ask:
        """Return a request for groups of `owner`, to the owner or to another peer that has them."""
        patience = max(0, min(int(self.deadline - time.monotonic()), messages.MAX_PATIENCE_SECONDS))
        return Ask(
            self.span.last,
            self.span.oldest(owner),
            patience,
            self.context.member().sealed,
            "" if is_owner else owner,
        )

    async def _request(
        self,
        peer_id: str,
        ask: Ask,
    ) -> tuple[Kind, bytes]:
        """Return the answer to a standing request."""
        async with self.connections.stream(peer_id) as stream:
            request = messages.encode_ask(ask)
            try:
                # Once its answer has begun, a slow peer has the rest of the round for it.
                kind, payload = await stream.ask(request, messages.MAX_FRAME_BYTES)
            except Refused as refusal:
                self._note_refusal(peer_id, refusal)
                raise
            self.context.peers.open(peer_id)
            self._hear(peer_id)
            num_waits = 0
            try:
                while kind is Kind.WAIT:
                    self._told_to_wait.add(peer_id)
                    num_waits += 1
                    if num_waits > MAX_WAITS:
                        raise BadRecord(
                            "flood", f"{peer_id} sent more than {MAX_WAITS} WAIT frames"
                        )
                    kind, payload = await stream.receive(messages.MAX_FRAME_BYTES)
            finally:
                self._told_to_wait.discard(peer_id)
        return kind, payload

    async def _check(
        self,
        owner: str,
        sender: str,
        ask: Ask,
        sealed: bytes,
    ) -> int:
        """Return the number of valid groups, 0 if they were used already.

        A peer that relays invalid groups is blamed: it should have verified them.
        """
        with self._judging():
            deadline = None if self.stays else self.deadline
            checked = await self.scoring.open_and_verify(sealed, owner, ask, deadline)
        scored, bad = checked.scored, checked.bad
        if checked.place is not None and scored:
            if checked.place < self.span.oldest(owner):
                return 0  # another peer sent them meanwhile, or our round moved on
            self.span.used[owner] = checked.place
            self.behind[max(0, self.round - checked.place.round)] += len(scored)
        self.tally.take_in(checked.num_groups, len(scored))
        self.groups += scored
        num_judged = checked.num_groups - sum(error.reason == "late" for error in bad)
        if num_judged or not checked.num_groups:
            self.context.peers.rate(owner, sum(g.has_signal for g in scored) / max(1, num_judged))
        if bad:
            self._blame(sender, bad)
        elif scored and checked.place is not None:
            self.serving.hold(checked.place, owner, sealed)
        if scored and INNOCENT.issuperset(error.reason for error in bad):
            self.context.peers.absolve(sender)
        return len(scored)

    def _note_refusal(self, peer_id: str, refusal: Refused) -> None:
        """Record a refusal; log it from time to time if the peer refuses us in general."""
        self.tally.note_refusal(refusal.reason)
        if refusal.reason in CLOSED:
            self.context.peers.close(peer_id)
            if refusal.reason == "version":
                self.context.peers.speaks(peer_id, refusal.version)
            elif not self.context.throttle.has((peer_id, "to us", refusal.reason)):
                log.warning(
                    "request refused by peer=%s round=%d reason=%s", peer_id, self.round, refusal
                )
        self._hear(peer_id)

    def _hear(self, peer_id: str) -> None:
        self.heard.add(peer_id)
        self.context.hear(peer_id)

    def _settle(self, task: "asyncio.Task[int]", peer_id: str) -> None:
        """Handle a request that ended; if it brought no valid group, another peer may be drawn."""
        error, peers = task.exception(), self.context.peers
        if error is None:
            self._answered += task.result() > 0
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

    def _blame(
        self,
        peer_id: str,
        errors: Sequence[BadRecord],
    ) -> None:
        """Count and log invalid groups; quarantine a sender that keeps sending them."""
        reasons = Counter(error.reason for error in errors)
        self._doubtful.add(peer_id)
        self.rejected.update(reasons)
        for error in errors:
            self.tally.reject(peer_id, error.reason)
        named = ",".join(f"{reason}:{count}" for reason, count in sorted(reasons.items()))
        log.warning(
            "groups rejected peer=%s round=%d reasons=%s: %s", peer_id, self.round, named, errors[0]
        )
        if not INNOCENT.issuperset(reasons) and (seconds := self.context.peers.strike(peer_id)):
            log.warning("peer quarantined peer=%s seconds=%d", peer_id, seconds)
            self.tally.quarantine(peer_id, f"{named}, for {seconds:.0f} s")
