"""A round's exchange among real nodes: each gets its groups from peers, against one DHT key that everybody reads whole.

    python -m benchmarks.swarm [--nodes 4 8 16 32] [--rounds 5] [--json FILE]

A round is 9 tasks x 8 completions x 600 bytes from each node. Ours: `worker.swarm.exchange`, as the worker uses it,
scoring left out (a look-up stands in). Reference: the existing way, `hivemind.dht.DHTNode` in one event loop: every
node stores its groups under the round's key and reads that key until all are there. Both have one libp2p daemon a node.

Runs in a network namespace of its own (`unshare`), whose loopback counts the bytes: nothing else talks there.
"""

import argparse
import asyncio
import json
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hivemind.dht.node import DHTNode
from hivemind.utils.timed_storage import get_dht_time

from worker import log, settings
from worker.records import Group, Task, round_seed
from worker.swarm import identity
from worker.swarm.exchange import Swarm
from worker.swarm.network import Network
from worker.swarm.verify import Verifier

NUM_TASKS, NUM_COMPLETIONS, COMPLETION_BYTES = 9, 8, 600
WANTED_GROUPS = 12
"""What a worker asks for: J = 4, three times over."""
READS_BEFORE_STORING_AGAIN = 10
WORDS = (Path(__file__).parent.parent / "docs/architecture.md").read_text().split()


@dataclass(frozen=True)
class Cost:
    """What one round costs: wall seconds until every node has its groups; the rest is per node."""

    seconds: float
    bytes: float
    cpu_seconds: float
    memory_mb: float


class Scored:
    """Stands in for an environment: what scoring costs is not the exchange's."""

    versions = ("benchmark 1",)
    families = ("f d",)

    def question(self, task: Task) -> str:
        return "question"

    def score(self, task: Task, completions: Sequence[str]) -> list[float]:
        return [float(len(c) % 2) for c in completions]


def write_groups(peer_id: str, round: int) -> list[Group]:
    """Text with the entropy of prose: answers are."""
    rng = random.Random(f"{peer_id}/{round}")
    seed = round_seed(peer_id, round)

    def answer() -> str:
        text = ""
        while len(text) < COMPLETION_BYTES:
            text += rng.choice(WORDS) + " "
        return text[:COMPLETION_BYTES]

    return [Group(Task("f", "d", seed, i), tuple(answer() for _ in range(NUM_COMPLETIONS))) for i in range(NUM_TASKS)]


# ---- ours


def measure_ours(num_nodes: int, rounds: int) -> list[Cost]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ["bootnode", *map(str, range(num_nodes))]:
            identity.create(folder / name / "swarm.pem")
        section = settings.Swarm(host="127.0.0.1")
        bootnode = Network(section, folder / "bootnode/swarm.pem", folder / "bootnode", is_member=False)
        bootnode.start()
        stack.callback(bootnode.close)
        wait_until(lambda: bootnode.is_up, "the bootnode is up")
        known = tuple(f"{a}/p2p/{bootnode.identity.peer_id}" for a in bootnode.addresses)
        section = section.model_copy(update={"bootnodes": known})
        verifier = Verifier(Scored(), section, NUM_COMPLETIONS)
        nodes = [Swarm(section, folder / str(i) / "swarm.pem", folder / str(i), verifier) for i in range(num_nodes)]
        for node in nodes:
            node.start()
            stack.callback(node.close)
        enough = min(num_nodes - 1, 2 * section.peers_per_round)
        wait_until(lambda: all(n.status().peers_known >= enough for n in nodes), "all nodes know enough peers")
        threads = stack.enter_context(ThreadPoolExecutor(num_nodes))
        return [_our_round(nodes, round, threads) for round in range(rounds)]


def _our_round(nodes: Sequence[Swarm], round: int, threads: ThreadPoolExecutor) -> Cost:
    written = [write_groups(node.status().peer_id, round) for node in nodes]

    def take_part(node: Swarm, groups: list[Group]) -> int:
        node.publish(round, groups)
        return len(node.collect(round, WANTED_GROUPS).groups)

    def work() -> None:
        got = list(threads.map(take_part, nodes, written))
        wanted = min(WANTED_GROUPS, NUM_TASKS * (len(nodes) - 1))
        assert min(got) >= wanted, f"round {round}: nodes got {got} groups, wanted {wanted}"

    return _measured(work, len(nodes))


# ---- the existing way


def measure_one_key(num_nodes: int, rounds: int) -> list[Cost]:
    with asyncio.Runner() as runner:
        nodes = runner.run(_start_dht(num_nodes))
        try:
            return [_dht_round(runner, nodes, round) for round in range(rounds)]
        finally:
            runner.run(_all(node.shutdown() for node in nodes))


async def _start_dht(num_nodes: int) -> list[DHTNode]:
    first = await DHTNode.create(host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    peers = await first.protocol.p2p.get_visible_maddrs()
    options = {"initial_peers": peers, "host_maddrs": ["/ip4/127.0.0.1/tcp/0"]}
    return [first, *[await DHTNode.create(**options) for _ in range(num_nodes - 1)]]


def _dht_round(runner: asyncio.Runner, nodes: Sequence[DHTNode], round: int) -> Cost:
    key = f"round-{round}"
    values = [
        pickle.dumps([(g.task.index, g.completions) for g in write_groups(str(i), round)]) for i in range(len(nodes))
    ]

    async def take_part(node: DHTNode, number: int) -> None:
        # Stores at the same instant may leave the replicas of a key different for good; storing again mends them.
        while True:
            await node.store(key, values[number], get_dht_time() + 120, subkey=str(number))
            for _ in range(READS_BEFORE_STORING_AGAIN):
                found = await node.get(key, latest=True)
                if found is not None and len(found.value) == len(nodes):
                    return
                await asyncio.sleep(0.02)

    async def all_take_part() -> None:
        async with asyncio.timeout(300):
            await _all(take_part(node, i) for i, node in enumerate(nodes))

    return _measured(lambda: runner.run(all_take_part()), len(nodes))


async def _all(work: "Sequence[Awaitable[object]] | object") -> None:
    await asyncio.gather(*work)  # type: ignore[misc]


# ---- measuring


def _measured(work: Callable[[], None], num_nodes: int) -> Cost:
    bytes_before, cpu_before, started = _loopback_bytes(), _cpu_seconds(), time.monotonic()
    work()
    seconds = time.monotonic() - started
    return Cost(
        seconds,
        (_loopback_bytes() - bytes_before) / num_nodes,
        (_cpu_seconds() - cpu_before) / num_nodes,
        _daemon_memory_mb() / num_nodes,
    )


def _loopback_bytes() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def _children() -> list[Path]:
    folders = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[1]) == os.getpid():
            folders.append(folder)
    return folders


def _cpu_seconds() -> float:
    """Of this process and its daemons."""
    ticks = 0
    for folder in [Path("/proc/self"), *_children()]:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _daemon_memory_mb() -> float:
    pages = sum(int((folder / "statm").read_text().split()[1]) for folder in _children())
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)


def median(costs: Sequence[Cost]) -> Cost:
    """Of each figure by itself; the first round, which opens the connections, is left out where there are others."""
    steady = costs[1:] or costs
    return Cost(*(statistics.median(getattr(c, name) for c in steady) for name in Cost.__dataclass_fields__))


def in_own_namespace(argv: Sequence[str]) -> int:
    """This program again, where loopback is the only network and nobody else is on it."""
    inside = 'ip link set lo up && exec "$@"'
    command = [sys.executable, "-m", "benchmarks.swarm", "--inside", *argv]
    return subprocess.call(["unshare", "--map-root-user", "--net", "sh", "-c", inside, "sh", *command])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.inside:
        sys.exit(in_own_namespace(sys.argv[1:]))
    log.setup("ERROR", "text")

    results = []
    print("       one key, all read it all        drawn peers, asked directly")
    print("nodes  seconds   MB/node  CPU s/node   seconds   MB/node  CPU s/node  faster  fewer bytes")
    for num_nodes in arguments.nodes:
        theirs = median(measure_one_key(num_nodes, arguments.rounds))
        ours = median(measure_ours(num_nodes, arguments.rounds))
        faster, fewer = theirs.seconds / ours.seconds, theirs.bytes / ours.bytes
        print(
            f"{num_nodes:5d}  {theirs.seconds:7.3f}  {theirs.bytes / 1e6:8.3f}  {theirs.cpu_seconds:10.3f}   "
            f"{ours.seconds:7.3f}  {ours.bytes / 1e6:8.3f}  {ours.cpu_seconds:10.3f}  {faster:5.1f}x  {fewer:10.1f}x",
            flush=True,
        )
        for what, mine, reference, ratio, unit in (
            ("seconds until all have their groups", ours.seconds, theirs.seconds, faster, "s"),
            ("bytes a node", ours.bytes, theirs.bytes, fewer, "bytes"),
            ("processor time a node", ours.cpu_seconds, theirs.cpu_seconds, theirs.cpu_seconds / ours.cpu_seconds, "s"),
            ("daemon memory a node", ours.memory_mb, theirs.memory_mb, theirs.memory_mb / ours.memory_mb, "MB"),
        ):
            results.append(
                {
                    "claim": f"{num_nodes} nodes: {what}",
                    "ours": round(mine, 4),
                    "reference": round(reference, 4),
                    "ratio": round(ratio, 2),
                    "unit": unit,
                }
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
