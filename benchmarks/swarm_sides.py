"""All nodes of one kind in their own network namespace, and the cost of a round.

The namespace's loopback is their only network and carries nothing else: it counts the bytes that
the nodes exchange, including those of TCP and libp2p.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from benchmarks.swarm_nodes import (
    NUM_TASKS,
    WANTED_GROUPS,
    Node,
    OneKeyNode,
    OurNode,
    daemons_of,
    memory_mb,
    process_seconds,
    run_node,
)
from worker import log, settings
from worker.swarm import identity
from worker.swarm.context import SwarmContext
from worker.swarm.network import Network

START_TOGETHER = 4
CALM_BYTES_PER_SECOND = 5_000
"""Bytes per node above which the nodes are still discovering each other."""
OURS, ONE_KEY = "ours", "one key"


@dataclass(frozen=True)
class Cost:
    """Cost of an interval: wall seconds until every node has its groups; the rest is per node.

    `bytes` as loopback counts them; `frame_bytes`: those of the exchange's own messages.
    """

    seconds: float
    bytes: float
    frame_bytes: float
    python_seconds: float
    daemon_seconds: float
    python_mb: float
    daemon_mb: float

    @property
    def cpu_seconds(self) -> float:
        return self.python_seconds + self.daemon_seconds


class Side:
    """`num_nodes` nodes of one kind, in a process with its own loopback."""

    def __init__(self, kind: str, num_nodes: int, stack: ExitStack) -> None:
        self._stack = stack
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.swarm_nodes"])
        self.nodes: list[Running] = []
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self._start_ours(folder, num_nodes) if kind == OURS else self._start_one_key(num_nodes)
        wait_until(lambda: all(self._ask_all("is_ready", num_nodes)), "all nodes know enough peers")
        self._wait_for_calm()

    def round(self, round: int, forget: bool = False) -> Cost:
        """Run a round; `forget`: every connection must be opened again."""
        self._ask_all("prepare", round)
        if forget:
            self._ask_all("forget")
            time.sleep(1)
        return self._measured(lambda: self._take_part(round))

    def idle(self, seconds: float) -> Cost:
        """Return the nodes' cost without work: membership, greetings."""
        return self._measured(lambda: time.sleep(seconds))

    def _start_ours(self, folder: Path, num_nodes: int) -> None:
        for name in ["bootnode", *map(str, range(num_nodes))]:
            identity.create(folder / name / "swarm.pem")
        section = settings.Swarm(host="127.0.0.1")
        context = SwarmContext(
            section, folder / "bootnode/swarm.pem", folder / "bootnode", is_member=False
        )
        bootnode = Network(context)
        bootnode.start()
        self._stack.callback(bootnode.close)
        wait_until(lambda: context.is_up, "the bootnode is up")
        known = [f"{a}/p2p/{context.identity.peer_id}" for a in context.addresses]
        self._start([_Maker(OurNode, folder / str(i), known) for i in range(num_nodes)])

    def _start_one_key(self, num_nodes: int) -> None:
        self._start([_Maker(OneKeyNode, "0", (), num_nodes)])
        first = self._ask_all("addresses")[0]
        self._start([_Maker(OneKeyNode, str(i), first, num_nodes) for i in range(1, num_nodes)])

    def _start(self, makers: Sequence["_Maker"]) -> None:
        for start in range(0, len(makers), START_TOGETHER):
            fresh = [
                Running(maker, self._context) for maker in makers[start : start + START_TOGETHER]
            ]
            for node in fresh:
                self._stack.callback(node.close)
                node.pipe.recv()
            self.nodes += fresh

    def _ask_all(self, *request: object) -> list[Any]:
        for node in self.nodes:
            node.pipe.send(request)
        return [node.pipe.recv() for node in self.nodes]

    def _take_part(self, round: int) -> None:
        for node in self.nodes:
            node.pipe.send(("take_part", round))
        got, waiting = [], {node.pipe for node in self.nodes}
        while waiting:
            ready = {pipe for pipe in wait(list(waiting)) if isinstance(pipe, Connection)}
            got += [pipe.recv() for pipe in ready]
            waiting -= ready
        wanted = min(WANTED_GROUPS, NUM_TASKS * (len(self.nodes) - 1))
        assert min(got) >= wanted, f"round {round}: nodes got {got} groups, wanted {wanted}"

    def _wait_for_calm(self, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            before = loopback_bytes()
            time.sleep(2)
            if (loopback_bytes() - before) / 2 < CALM_BYTES_PER_SECOND * len(self.nodes):
                return

    def _measured(self, work: Callable[[], None]) -> Cost:
        """Read the counters from outside, without involving the nodes."""
        pids = [node.pid for node in self.nodes]
        daemons = [daemon for pid in pids for daemon in daemons_of(pid)]
        frames = sum(self._ask_all("frame_bytes"))
        python_before, daemon_before = _processor_seconds(pids), _processor_seconds(daemons)
        bytes_before, started = loopback_bytes(), time.monotonic()
        work()
        seconds, num_bytes = time.monotonic() - started, loopback_bytes() - bytes_before
        python, daemon = (
            _processor_seconds(pids) - python_before,
            _processor_seconds(daemons) - daemon_before,
        )
        frames = sum(self._ask_all("frame_bytes")) - frames
        memory = [sum(memory_mb(pid) for pid in group) for group in (pids, daemons)]
        return Cost(
            seconds, *(value / len(pids) for value in (num_bytes, frames, python, daemon, *memory))
        )


def _processor_seconds(pids: Sequence[int]) -> float:
    return sum(process_seconds(pid) for pid in pids)


class Running:
    """A node's process, which can be killed and started again, as systemd does."""

    def __init__(self, maker: "_Maker", context: ForkServerContext) -> None:
        self._maker, self._context = maker, context
        self.start()

    def start(self) -> None:
        """Wait for the empty message with which a new node reports that it is ready."""
        self.pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=run_node, args=(self._maker, theirs))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def close(self) -> None:
        self.pipe.close()
        self._process.join(20)


class _Maker:
    """Constructor of a node, to be called in another process."""

    def __init__(self, kind: Callable[..., Node], *arguments: object) -> None:
        self._kind, self._arguments = kind, arguments

    def __call__(self) -> Node:
        return self._kind(*self._arguments)


def loopback_bytes() -> int:
    line = next(
        line
        for line in Path("/proc/net/dev").read_text().splitlines()
        if line.strip().startswith("lo:")
    )
    return int(line.split(":")[1].split()[0])


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)


# ---- from outside


def in_own_namespace(
    module: str, arguments: Sequence[str], piped: bool = False
) -> "subprocess.Popen[str]":
    """Run one of our programs in a namespace with its own loopback."""
    inside = 'ip link set lo up && exec "$@"'
    command = [sys.executable, "-m", module, *arguments]
    pipe = subprocess.PIPE if piped else None
    return subprocess.Popen(
        ["unshare", "--map-root-user", "--net", "sh", "-c", inside, "sh", *command],
        stdin=pipe,
        stdout=pipe,
        text=True,
    )


class Remote:
    """A Side in its own namespace, controlled by lines of JSON."""

    def __init__(self, kind: str, num_nodes: int) -> None:
        self._process = in_own_namespace(
            "benchmarks.swarm_sides", [kind, str(num_nodes)], piped=True
        )

    def wait_ready(self) -> None:
        self._read()

    def round(self, round: int, forget: bool = False) -> Cost:
        return Cost(**self._ask("round", round, forget))

    def idle(self, seconds: float) -> Cost:
        return Cost(**self._ask("idle", seconds))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=120)

    def _ask(self, *request: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the nodes ended with {self._process.wait()}; their output is above")
        return json.loads(line)


def main() -> None:
    kind, num_nodes = sys.argv[1], int(sys.argv[2])
    log.setup("ERROR", "text")
    with ExitStack() as stack:
        side = Side(kind, num_nodes, stack)
        print("null", flush=True)
        for line in sys.stdin:
            method, *arguments = json.loads(line)
            cost = side.round(*arguments) if method == "round" else side.idle(*arguments)
            print(json.dumps(asdict(cost)), flush=True)


if __name__ == "__main__":
    main()
