"""A round's exchange among real nodes, against one DHT key that all nodes read whole.

    python -m benchmarks.swarm [--nodes 4 8 16 32] [--rounds 5] [--idle SECONDS] [--json FILE]

A round is 9 tasks x 8 completions x 600 bytes from each node. Ours: `worker.swarm.swarm` as the
worker uses it, with a look-up instead of scoring. Reference: RL Swarm's way, with
`hivemind.dht.DHTNode`: every node stores its groups under the round's key and reads that key until
it has all. Each node is a process with its own libp2p daemon. The two alternate, round by round,
and each has its own network namespace, whose loopback counts its bytes (benchmarks/swarm_sides.py).
Figures are medians over the rounds without the first.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.swarm_nodes import prose, write_groups, write_related_groups
from benchmarks.swarm_sides import ONE_KEY, OURS, Cost, Remote
from worker.swarm import identity
from worker.swarm.protocol import messages

SECONDS = "seconds until all have their groups"
BYTES = "bytes a node"
CPU = "processor time a node"
NEW_BYTES = "bytes a node, all connections new"
NEW_CPU = "processor time a node, all connections new"
IDLE_BYTES = "bytes a node and minute, idle"
IDLE_CPU = "processor time a node and minute, idle"
NUM_NEW_ROUNDS = 3
FLAT_FROM, FLAT_TO = 8, 32


@dataclass(frozen=True)
class Measured:
    """One size of swarm.

    `new`: rounds of ours in which every connection had to be opened first. `idle`: ours without
    work (None: not measured).
    """

    num_nodes: int
    ours: Cost
    theirs: Cost
    new: Cost
    idle: Cost | None

    def show(self) -> None:
        ours, theirs, new, idle = self.ours, self.theirs, self.new, self.idle
        print(
            f"{self.num_nodes:5d}  {theirs.seconds:7.3f}  {theirs.bytes / 1e6:8.3f} "
            f" {theirs.cpu_seconds:10.4f}   {ours.seconds:7.3f}  {ours.bytes / 1e6:8.4f} "
            f" {ours.cpu_seconds:10.4f}  {theirs.seconds / ours.seconds:5.1f}x "
            f" {theirs.bytes / ours.bytes:10.1f}x  {theirs.cpu_seconds / ours.cpu_seconds:7.1f}x"
        )
        print(
            f"       ours: {ours.frame_bytes / 1e3:.1f} of {ours.bytes / 1e3:.1f} KB are frames,"
            f" processor {ours.python_seconds * 1e3:.1f} ms Python +"
            f" {ours.daemon_seconds * 1e3:.1f} ms daemon, memory {ours.python_mb:.0f} +"
            f" {ours.daemon_mb:.0f} MB; all connections new: {new.seconds:.3f} s,"
            f" {new.bytes / 1e3:.1f} KB, {new.cpu_seconds * 1e3:.1f} ms",
            flush=True,
        )
        if idle is not None:
            per_minute = 60 / idle.seconds
            print(
                f"       ours, idle: {idle.bytes * per_minute / 1e3:.1f} KB and "
                f"{idle.cpu_seconds * per_minute * 1e3:.1f} ms of processor time a node and minute",
                flush=True,
            )

    def claims(self) -> list[dict[str, Any]]:
        ours, theirs = self.ours, self.theirs
        rows = [
            (SECONDS, ours.seconds, theirs.seconds, "s"),
            (BYTES, ours.bytes, theirs.bytes, "bytes"),
            (CPU, ours.cpu_seconds, theirs.cpu_seconds, "s"),
            ("processor time of Python a node", ours.python_seconds, theirs.python_seconds, "s"),
            (
                "processor time of the daemon a node",
                ours.daemon_seconds,
                theirs.daemon_seconds,
                "s",
            ),
            ("memory of Python a node", ours.python_mb, theirs.python_mb, "MB"),
            ("memory of the daemon a node", ours.daemon_mb, theirs.daemon_mb, "MB"),
            (NEW_BYTES, self.new.bytes, theirs.bytes, "bytes"),
            (NEW_CPU, self.new.cpu_seconds, theirs.cpu_seconds, "s"),
        ]
        if self.idle is not None:
            per_minute = 60 / self.idle.seconds
            rows += [
                (IDLE_BYTES, self.idle.bytes * per_minute, theirs.bytes, "bytes"),
                (IDLE_CPU, self.idle.cpu_seconds * per_minute, theirs.cpu_seconds, "s"),
            ]
        return [
            _claim(f"{self.num_nodes} nodes: {what}", mine, other, unit)
            for what, mine, other, unit in rows
        ]


def measure(num_nodes: int, rounds: int, idle_seconds: float) -> Measured:
    with ExitStack() as stack:
        ours, theirs = (_start(kind, num_nodes, stack) for kind in (OURS, ONE_KEY))
        pairs = [(ours.round(number), theirs.round(number)) for number in range(rounds + 1)]
        idle = ours.idle(idle_seconds) if idle_seconds else None
        new = [ours.round(rounds + 1 + number, forget=True) for number in range(NUM_NEW_ROUNDS)]
        return Measured(
            num_nodes,
            _median([o for o, _ in pairs[1:]]),
            _median([t for _, t in pairs[1:]]),
            _median(new),
            idle,
        )


def _start(kind: str, num_nodes: int, stack: ExitStack) -> Remote:
    side = Remote(kind, num_nodes)
    stack.callback(side.close)
    side.wait_ready()
    return side


def _median(costs: Sequence[Cost]) -> Cost:
    """Return the median of each figure."""
    return Cost(
        *(statistics.median(getattr(cost, field.name) for cost in costs) for field in fields(Cost))
    )


def _claim(what: str, ours: float, reference: float, unit: str) -> dict[str, Any]:
    """A row of results; `ratio`: how much smaller ours is."""
    return {
        "claim": what,
        "ours": round(ours, 4),
        "reference": round(reference, 4),
        "ratio": round(reference / ours, 2),
        "unit": unit,
    }


def compare_sizes(few: Measured, many: Measured) -> list[dict[str, Any]]:
    """Return whether a node's cost depends on the number of nodes."""
    rows = []
    for what, name, unit in ((BYTES, "bytes", "bytes"), (CPU, "cpu_seconds", "s")):
        small, large = getattr(few.ours, name), getattr(many.ours, name)
        print(
            f"{what}: {large / small:.2f} times as much with {many.num_nodes} nodes as with"
            f" {few.num_nodes}"
        )
        rows.append(
            _claim(
                f"ours, {many.num_nodes} nodes against {few.num_nodes}: {what}", large, small, unit
            )
        )
    return rows


def weigh() -> list[dict[str, Any]]:
    """Return a peer's groups of a round as they travel: packed, compressed, signed."""
    rows, text = [], prose()
    with tempfile.TemporaryDirectory() as folder:
        me = identity.create(Path(folder) / "swarm.pem")
    for kind, write in (
        ("nothing in common", write_groups),
        ("much in common", write_related_groups),
    ):
        groups = write(text, me.peer_id, 0)
        plain = sum(len(c) for g in groups for c in g.completions)
        started = time.process_time()
        frame = messages.encode_frame(messages.Kind.GROUPS, messages.seal_groups(me, 0, groups))
        milliseconds = 1000 * (time.process_time() - started)
        print(
            f"answers that have {kind}: {plain} bytes, {len(frame)} on the wire, {milliseconds:.1f}"
            " ms to make"
        )
        rows.append(
            _claim(
                f"bytes of a round's groups on the wire, answers that have {kind}",
                len(frame),
                plain,
                "bytes",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--idle", type=float, default=0, help="seconds to watch our nodes with nothing to do"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    results = weigh()
    print("       one key, all read it all        drawn peers, asked directly")
    print(
        "nodes  seconds   MB/node  CPU s/node   seconds   MB/node  CPU s/node  faster  fewer bytes "
        " less CPU"
    )
    sizes: dict[int, Measured] = {}
    for num_nodes in arguments.nodes:
        sizes[num_nodes] = measure(num_nodes, arguments.rounds, arguments.idle)
        sizes[num_nodes].show()
        results += sizes[num_nodes].claims()
    if FLAT_FROM in sizes and FLAT_TO in sizes:
        results += compare_sizes(sizes[FLAT_FROM], sizes[FLAT_TO])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
