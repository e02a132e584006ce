"""The model behind benchmarks/swarm_sim.py: hosts, links and cores as queues."""

import heapq
import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.swarm_nodes import COMPLETION_BYTES, NUM_COMPLETIONS, NUM_TASKS, WANTED_GROUPS
from worker.settings import Swarm
from worker.swarm.exchange.collector import LOOK_EVERY_SECONDS, MAX_DRAWS_PER_PEER
from worker.swarm.transport.connections import CONNECT_TIMEOUT_SECONDS
from worker.swarm.transport.streams import MAX_STREAMS

DEFAULTS = Swarm()
ROUNDS = 3
ROUND_SECONDS = 180.0
WRITING_SECONDS, WRITING_SIGMA = 40.0, 0.4
"""Median and spread (log-normal) of a node's time to generate its groups."""
LINKS = ((0.7, 100.0, 20.0), (0.2, 20.0, 5.0), (0.1, 4.0, 1.0))
"""Each kind of link: share of the nodes, Mbit/s down, Mbit/s up."""
FAR_SECONDS = 0.25
"""Round trip between the two most distant nodes; near ones have 10 ms."""
SESSION_SECONDS, ABSENCE_SECONDS = 3600.0, 600.0
"""Means (exponential) of a node's time in the swarm and away from it; it leaves silently."""
VISIBLE_SECONDS = 2.5 * DEFAULTS.announce_every_seconds
"""How long a departed node stays in the others' views: its record lives for three announcements."""
NUM_REPLICAS = 5
MAX_READABLE_BYTES = 4.19e6
"""hivemind's limit: a larger value under one key can be stored, but not read."""
POLL_PAUSE_SECONDS = 0.02
NEW_CONNECTION_TRIPS = 4
NUM_FETCHES = math.ceil(WANTED_GROUPS / NUM_TASKS)
"""Requests that a node needs in a round if all peers are ready."""
VALUE_BYTES = NUM_TASKS * NUM_COMPLETIONS * (COMPLETION_BYTES + 5)


@dataclass(frozen=True)
class Costs:
    """Costs measured among 8 nodes: bytes and processor seconds of both ends together."""

    fetch_bytes: float
    fetch_seconds: float
    connection_bytes: float
    connection_seconds: float
    idle_bytes_per_minute: float
    key_seconds_per_byte: float


class Clock:
    """A queue of events in their order of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (max(time, self.now), next(self._numbers), action))

    def run(self) -> None:
        while self._queue:
            self.now, _, action = heapq.heappop(self._queue)
            action()


class Queue:
    """A resource whose places each serve one request at a time: cores, or a link's direction."""

    def __init__(self, speed: float, places: int = 1) -> None:
        self._speed = speed
        self._free = [0.0] * places

    def done(self, now: float, amount: float) -> float:
        """Return when a piece of work that arrives now is finished."""
        end = max(now, heapq.heappop(self._free)) + amount / self._speed
        heapq.heappush(self._free, end)
        return end


@dataclass
class Host:
    """A node's machine and link; `changes`: times of joining and leaving, alternating."""

    number: int
    place: tuple[float, float]
    down: Queue
    up: Queue
    cores: Queue
    changes: list[float]
    met: set[int] = field(default_factory=set)
    ready_at: float = 0.0
    num_open: int = 0

    def is_up(self, time: float) -> bool:
        return bisect_right(self.changes, time) % 2 == 1

    def is_seen(self, time: float) -> bool:
        """Return whether others have it in their views: it is present, or was recently."""
        index = bisect_right(self.changes, time)
        return index % 2 == 1 or (index > 0 and self.changes[index - 1] > time - VISIBLE_SECONDS)

    def stays(self, start: float, end: float) -> bool:
        return self.is_up(start) and bisect_right(self.changes, start) == bisect_right(
            self.changes, end
        )


@dataclass
class Outcome:
    """One node's round: its groups, and the seconds until it had enough (None: never).

    Seconds count from when its own groups were ready.
    """

    seconds: float | None = None
    groups: int = 0


@dataclass
class Result:
    """Results: `alone`, the share of rounds without any group of others; `short`: too few."""

    num_nodes: int
    median_seconds: float | None
    late_seconds: float | None  # 95 of 100 are faster
    bytes_a_node: float
    alone: float
    short: float


class World:
    """All nodes, one round after the other."""

    def __init__(self, num_nodes: int, seed: int, cores: Queue | None = None) -> None:
        """Make the nodes.

        `cores`: of the one machine that runs all nodes; None: each has its own remote machine and
        comes and goes.
        """
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.is_local = cores is not None
        self.bytes = self.seconds = 0.0  # that all nodes sent; of all processors
        self.hosts = [self._make(number, cores) for number in range(num_nodes)]

    def _make(self, number: int, cores: Queue | None) -> Host:
        rng = self.rng
        if cores is not None:
            return Host(number, (0, 0), Queue(1e12), Queue(1e12), cores, [-1e9])
        shares = [share for share, _, _ in LINKS]
        _, down, up = rng.choices(LINKS, shares)[0]
        changes, time = [-1e9], 0.0
        if rng.random() < ABSENCE_SECONDS / (SESSION_SECONDS + ABSENCE_SECONDS):
            changes += [-rng.expovariate(1 / ABSENCE_SECONDS), rng.expovariate(1 / ABSENCE_SECONDS)]
            time = changes[-1]
        while time < (ROUNDS + 1) * ROUND_SECONDS:
            time += rng.expovariate(1 / SESSION_SECONDS)
            changes += [time, time := time + rng.expovariate(1 / ABSENCE_SECONDS)]
        place = (rng.random(), rng.random())
        return Host(number, place, Queue(down * 1e6 / 8), Queue(up * 1e6 / 8), Queue(1.0), changes)

    def trip(self, one: Host, other: Host) -> float:
        """Return the round trip in seconds."""
        if self.is_local:
            return 0.0002
        distance = math.dist(one.place, other.place) / math.sqrt(2)
        return 0.01 + (FAR_SECONDS - 0.01) * distance

    def send(
        self,
        sender: Host,
        receiver: Host,
        num_bytes: float,
        seconds: float,
        then: Callable[[], None],
    ) -> None:
        """Send a message now and call `then` on receipt; each end takes half of `seconds`."""
        clock = self.clock
        self.bytes += num_bytes
        self.seconds += seconds

        def arrive() -> None:
            clock.at(receiver.down.done(clock.now, num_bytes), take_in)

        def take_in() -> None:
            clock.at(receiver.cores.done(clock.now, seconds / 2), then)

        def leave() -> None:
            clock.at(sender.up.done(clock.now, num_bytes) + self.trip(sender, receiver) / 2, arrive)

        clock.at(sender.cores.done(clock.now, seconds / 2), leave)

    def play(self, way: "type[Ours] | type[OneKey]", costs: Costs, rounds: int) -> list[Outcome]:
        """Run `rounds` rounds; return results of nodes that were present for a whole round."""
        outcomes = []
        for number in range(rounds):
            start = number * ROUND_SECONDS
            present = [host for host in self.hosts if host.is_up(start)]
            for host in self.hosts:
                host.ready_at = float("inf")
            for host in present:
                spread = (
                    0.0
                    if self.is_local
                    else WRITING_SECONDS * self.rng.lognormvariate(0, WRITING_SIGMA)
                )
                host.ready_at = start + min(
                    spread, ROUND_SECONDS - DEFAULTS.collect_timeout_seconds
                )
            self.clock.now = start
            parts = [way(self, host, present, costs) for host in present]
            if isinstance(parts[0], OneKey):
                OneKey.begin(parts, self.rng)  # type: ignore[arg-type]
            for part in parts:
                self.clock.at(part.me.ready_at, part.start)
            self.clock.run()
            outcomes += [p.outcome for p in parts if p.me.stays(start, p.deadline)]
        return outcomes


class Ours:
    """Simulate one node's round: requests to drawn peers; a failed one is replaced by another."""

    def __init__(self, world: World, me: Host, present: Sequence[Host], costs: Costs) -> None:
        self.me, self.outcome, self.deadline = (
            me,
            Outcome(),
            me.ready_at + DEFAULTS.collect_timeout_seconds,
        )
        self._world, self._costs = world, costs
        self._wanted = min(WANTED_GROUPS, NUM_TASKS * (len(present) - 1))
        self._drawn = {me.number}
        self._open = self._answered = 0

    def start(self) -> None:
        clock, now = self._world.clock, self.me.ready_at
        self._draw()
        clock.at(now + LOOK_EVERY_SECONDS, self._draw)
        clock.at((now + self.deadline) / 2, self._draw)

    @property
    def _is_over(self) -> bool:
        return self.outcome.groups >= self._wanted or self._world.clock.now >= self.deadline

    def _draw(self) -> None:
        now = self._world.clock.now
        while not self._is_over and self._open < self._choose_number(now):
            peer = (
                self._choose(now)
                if len(self._drawn) <= MAX_DRAWS_PER_PEER * DEFAULTS.peers_per_round
                else None
            )
            if peer is None:
                return
            self._drawn.add(peer.number)
            self._open += 1
            self._ask(peer)

    def _choose_number(self, now: float) -> int:
        """Return how many requests to keep open, as worker/swarm/exchange/collector.py does.

        First as many as are still needed, soon k, and in the second half of the time 2k. k is
        `peers_per_round` less the peers that have answered.
        """
        number = DEFAULTS.peers_per_round - self._answered
        if now >= (self.me.ready_at + self.deadline) / 2:
            return 2 * number
        if now < self.me.ready_at + LOOK_EVERY_SECONDS:
            return min(number, math.ceil((self._wanted - self.outcome.groups) / NUM_TASKS))
        return number

    def _choose(self, now: float) -> Host | None:
        hosts = self._world.hosts
        for _ in range(200):
            peer = hosts[self._world.rng.randrange(len(hosts))]
            if peer.number not in self._drawn and peer.is_seen(now):
                return peer
        return None

    def _ask(self, peer: Host) -> None:
        world, costs = self._world, self._costs
        now, trip, is_new = (
            world.clock.now,
            world.trip(self.me, peer),
            peer.number not in self.me.met,
        )
        if not peer.is_up(now):
            world.clock.at(now + CONNECT_TIMEOUT_SECONDS, self._failed)
            return
        if is_new:
            self.me.met.add(peer.number)
            peer.met.add(self.me.number)
            world.send(
                self.me, peer, costs.connection_bytes, costs.connection_seconds, lambda: None
            )
        arrives = now + trip * (NEW_CONNECTION_TRIPS * is_new + 1.5)
        world.clock.at(arrives, lambda: self._arrive(peer))

    def _arrive(self, peer: Host) -> None:
        clock = self._world.clock
        if peer.num_open >= MAX_STREAMS:
            clock.at(clock.now + self._world.trip(self.me, peer) / 2, self._failed)
            return
        peer.num_open += 1
        # A peer that goes away, or never gets ready, is silent: the request stays open.
        clock.at(min(max(clock.now, peer.ready_at), self.deadline), lambda: self._serve(peer))

    def _serve(self, peer: Host) -> None:
        clock = self._world.clock
        peer.num_open -= 1
        if self._is_over or clock.now < peer.ready_at or not peer.is_up(clock.now):
            return
        self._world.send(
            peer, self.me, self._costs.fetch_bytes, self._costs.fetch_seconds, self._receive
        )

    def _receive(self) -> None:
        was_over = self._is_over
        self._open -= 1
        self._answered += 1
        if self._world.clock.now < self.deadline:
            self.outcome.groups += NUM_TASKS
        if not was_over and self.outcome.groups >= self._wanted:
            self.outcome.seconds = self._world.clock.now - self.me.ready_at
        self._draw()

    def _failed(self) -> None:
        self._open -= 1
        self._draw()


class OneKey:
    """Simulate RL Swarm's way: store under the round's key, and read the key until complete."""

    def __init__(self, world: World, me: Host, present: Sequence[Host], costs: Costs) -> None:
        self.me, self.outcome, self.deadline = (
            me,
            Outcome(),
            me.ready_at + DEFAULTS.collect_timeout_seconds,
        )
        self._world, self._costs = world, costs
        self._replicas: list[Host] = []
        self._held: dict[int, set[int]] = {}
        everything = NUM_TASKS * (len(present) - 1)
        self._wanted = everything if world.is_local else min(WANTED_GROUPS, everything)

    @staticmethod
    def begin(parts: Sequence["OneKey"], rng: random.Random) -> None:
        replicas = rng.sample([part.me for part in parts], min(NUM_REPLICAS, len(parts)))
        held: dict[int, set[int]] = {host.number: set() for host in replicas}
        for part in parts:
            part._replicas, part._held = replicas, held

    def start(self) -> None:
        self._missing = len(self._replicas)
        for replica in self._replicas:
            self._move(self.me, replica, VALUE_BYTES, lambda r=replica: self._stored(r))  # type: ignore[misc]

    def _stored(self, replica: Host) -> None:
        self._held[replica.number].add(self.me.number)
        self._missing -= 1
        if not self._missing:
            self._read()

    def _read(self) -> None:
        """Read from all replicas at once, as `latest=True` does."""
        clock = self._world.clock
        if (
            clock.now >= self.deadline
            or max(map(len, self._held.values())) * VALUE_BYTES > MAX_READABLE_BYTES
        ):
            return  # what is under the key only grows
        self._missing, self._seen = len(self._replicas), {self.me.number}
        for replica in self._replicas:
            asked = clock.now + self._world.trip(self.me, replica) / 2
            clock.at(asked, lambda r=replica: self._answer(r))  # type: ignore[misc]

    def _answer(self, replica: Host) -> None:
        held = set(self._held[replica.number])
        num_bytes = len(held) * VALUE_BYTES
        self._move(replica, self.me, num_bytes, lambda: self._take(held))

    def _take(self, held: set[int]) -> None:
        self._seen |= held
        self._missing -= 1
        if not self._missing:
            self._have(len(self._seen) - 1)

    def _move(
        self, sender: Host, receiver: Host, num_bytes: float, then: Callable[[], None]
    ) -> None:
        if sender is receiver:
            self._world.clock.at(self._world.clock.now, then)
        else:
            self._world.send(
                sender, receiver, num_bytes, num_bytes * self._costs.key_seconds_per_byte, then
            )

    def _have(self, num_senders: int) -> None:
        clock = self._world.clock
        if clock.now < self.deadline:
            self.outcome.groups = NUM_TASKS * num_senders
            if self.outcome.groups >= self._wanted:
                self.outcome.seconds = clock.now - self.me.ready_at
                return
        clock.at(clock.now + POLL_PAUSE_SECONDS, self._read)


def simulate(
    way: type[Ours] | type[OneKey],
    num_nodes: int,
    costs: Costs,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Result:
    """Simulate nodes all over the world."""
    world = World(num_nodes, seed)
    outcomes = world.play(way, costs, rounds)
    idle = costs.idle_bytes_per_minute * ROUND_SECONDS / 60
    return _result(num_nodes, outcomes, world.bytes / (rounds * num_nodes) + idle)


def foretell(
    way: type[Ours] | type[OneKey], num_nodes: int, costs: Costs, seed: int = 0
) -> tuple[float, float, float]:
    """Simulate nodes on one machine with two idle cores.

    Returns the seconds until all have their groups, and processor seconds and bytes per node.
    """
    world = World(num_nodes, seed, Queue(1.0, places=2))
    for host in world.hosts:
        host.met = set(range(num_nodes))
    outcomes = world.play(way, costs, 1)
    seconds = max(o.seconds or float("inf") for o in outcomes)
    return seconds, world.seconds / num_nodes, world.bytes / num_nodes


def _result(num_nodes: int, outcomes: Sequence[Outcome], bytes_a_node: float) -> Result:
    times = sorted(o.seconds for o in outcomes if o.seconds is not None)
    total = len(outcomes)
    return Result(
        num_nodes,
        # Those that never got enough count as slower than any.
        times[total // 2] if total // 2 < len(times) else None,
        times[total * 95 // 100] if total * 95 // 100 < len(times) else None,
        bytes_a_node,
        sum(o.groups == 0 for o in outcomes) / total,
        sum(o.seconds is None for o in outcomes) / total,
    )
