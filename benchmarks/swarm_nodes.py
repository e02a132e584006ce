"""The nodes of the swarm benchmarks: a process each, with a libp2p daemon each."""

import asyncio
import os
import pickle
import random
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.utils import MSGPackSerializer
from hivemind.utils.timed_storage import get_dht_time

from worker import log, settings
from worker.records import Group, Task, round_seed
from worker.swarm.exchange.verify import Verifier
from worker.swarm.swarm import Swarm

NUM_TASKS, NUM_COMPLETIONS, COMPLETION_BYTES = 9, 8, 600
WANTED_GROUPS = 12
"""Groups that a worker requests: three times the J = 4 that it trains on."""
READS_BEFORE_STORING_AGAIN = 10
ROUND_TIMEOUT_SECONDS = 300

T = TypeVar("T")


class Scored:
    """A stand-in for an environment, since scoring is not part of the exchange's cost."""

    versions = ("benchmark 1",)
    families = ("f d",)

    def question(self, task: Task) -> str:
        return "question"

    def score(self, task: Task, completions: Sequence[str]) -> list[float]:
        return [float(len(c) % 2) for c in completions]


def prose() -> str:
    """Return about 400 KB of English: the texts of Python's own `help()`."""
    from pydoc_data.topics import topics

    return " ".join(" ".join(topics.values()).split()).encode("ascii", errors="ignore").decode()


def write_groups(text: str, peer_id: str, round: int) -> list[Group]:
    """Return unrelated passages of `text`, which compress worst among possible answers."""
    rng = random.Random(f"{peer_id}/{round}")
    return _groups(
        peer_id,
        round,
        lambda: [_passage(text, COMPLETION_BYTES, rng) for _ in range(NUM_COMPLETIONS)],
    )


def write_related_groups(text: str, peer_id: str, round: int) -> list[Group]:
    """Return similar answers to one task: each has half of twenty phrases, in its own order."""
    rng = random.Random(f"{peer_id}/{round}")

    def answers() -> list[str]:
        phrases = [_passage(text, COMPLETION_BYTES // 10, rng) for _ in range(20)]
        return ["".join(rng.sample(phrases, 10)) for _ in range(NUM_COMPLETIONS)]

    return _groups(peer_id, round, answers)


def _passage(text: str, length: int, rng: random.Random) -> str:
    start = rng.randrange(len(text) - length)
    return text[start : start + length]


def _groups(peer_id: str, round: int, answers: Callable[[], list[str]]) -> list[Group]:
    seed = round_seed(peer_id, round)
    return [Group(Task("f", "d", seed, i), tuple(answers())) for i in range(NUM_TASKS)]


# ---- one node, in its process


class Node(Protocol):
    def prepare(self, round: int) -> None: ...

    def take_part(self, round: int) -> int:
        """Return the number of groups that it got."""

    def is_ready(self, num_nodes: int) -> bool: ...

    def frame_bytes(self) -> int: ...

    def close(self) -> None: ...


class OurNode:
    """`worker.swarm.swarm` as the worker uses it, without scoring."""

    def __init__(self, folder: Path, bootnodes: Sequence[str]) -> None:
        self._section = settings.Swarm(host="127.0.0.1", bootnodes=tuple(bootnodes))
        self._text = prose()
        self._swarm = Swarm(
            self._section, folder / "swarm.pem", folder, Verifier(Scored(), self._section, 8)
        )
        self._swarm.start()

    def prepare(self, round: int) -> None:
        self._groups = write_groups(self._text, self._swarm.status().peer_id, round)

    def take_part(self, round: int) -> int:
        self._swarm.publish(round, self._groups)
        return len(self._swarm.collect(round, WANTED_GROUPS).groups)

    def forget(self) -> None:
        """Drop every connection."""
        network = self._swarm._network

        async def drop() -> None:
            daemon = network.connections.daemon
            assert daemon is not None
            for peer_id in await daemon.connections():
                await daemon.disconnect(peer_id)

        network.call(drop(), 30)

    def is_ready(self, num_nodes: int) -> bool:
        return self._swarm.status().peers_known >= min(
            num_nodes - 1, 2 * self._section.peers_per_round
        )

    def frame_bytes(self) -> int:
        return self._swarm.status().bytes_in

    def close(self) -> None:
        self._swarm.close()


class OneKeyNode:
    """RL Swarm's way: nodes store groups under the round's key and read it until complete."""

    def __init__(self, name: str, first: Sequence[str], num_nodes: int) -> None:
        self._name, self._num_nodes, self._text = name, num_nodes, prose()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        # hivemind's own serializer: importing `worker` has replaced it with one with bounds
        DHTProtocol.serializer = MSGPackSerializer
        options = {
            "initial_peers": list(first),
            "host_maddrs": ["/ip4/127.0.0.1/tcp/0"],
            "startup_timeout": 60,
        }
        self._node = self._call(DHTNode.create(**options))

    def addresses(self) -> list[str]:
        return [str(a) for a in self._call(self._node.protocol.p2p.get_visible_maddrs())]

    def prepare(self, round: int) -> None:
        groups = write_groups(self._text, self._name, round)
        self._value = pickle.dumps([(g.task.index, g.completions) for g in groups])

    def take_part(self, round: int) -> int:
        return self._call(self._share(f"round-{round}"))

    async def _share(self, key: str) -> int:
        # Stores at the same instant may leave the replicas of a key different for good; storing
        # again fixes them.
        async with asyncio.timeout(ROUND_TIMEOUT_SECONDS):
            while True:
                await self._node.store(key, self._value, get_dht_time() + 120, subkey=self._name)
                for _ in range(READS_BEFORE_STORING_AGAIN):
                    found = await self._node.get(key, latest=True)
                    if found is not None and len(found.value) == self._num_nodes:
                        return NUM_TASKS * (self._num_nodes - 1)
                    await asyncio.sleep(0.02)

    def is_ready(self, num_nodes: int) -> bool:
        return len(self._node.protocol.routing_table.peer_id_to_uid) >= min(num_nodes - 1, 8)

    def frame_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self._call(self._node.shutdown())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(ROUND_TIMEOUT_SECONDS + 10)


def run_node(make: Callable[[], Node], pipe: Connection) -> None:
    """Execute commands from the pipe until it closes: each names a method and its arguments."""
    log.setup("ERROR", "text")
    node = make()
    methods: dict[str, Callable[..., object]] = {
        name: getattr(node, name) for name in dir(node) if not name.startswith("_")
    }
    pipe.send(None)
    while True:
        try:
            method, *arguments = pipe.recv()
        except EOFError:
            break
        pipe.send(methods[method](*arguments))
    node.close()


def daemons_of(pid: int) -> list[int]:
    """Return the child processes of a node: its libp2p daemon."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def process_seconds(pid: int) -> float:
    """Return the processor time of another process by its own clock, which is finer than /proc."""
    return time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid(3) gives


def memory_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
