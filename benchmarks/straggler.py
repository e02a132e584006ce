"""A fast node next to a slow one: the tokens it trains per hour, against a node alone.

    python -m benchmarks.straggler [--slower 10] [--seconds 30] [--json FILE]

The nodes are real, each a process with its own libp2p daemon: round loop, exchange, verification,
training of the tiny model. Their speeds are artificial: generation and training are prolonged to
fixed times by sleeping, ten times as long for the slow node, so that the load of the machine does
not matter as long as the work itself is shorter. A node alone counts rounds by itself, and never
waits. In a swarm the chain is a counter that this process advances by the rules of the keeper,
which waits for both nodes. `as before`: nodes wait for the groups of their peers
(`collect_timeout_seconds` at most) and for the next round, as all did before rounds had parts.
"""

import argparse
import json
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from worker import enrolment, settings
from worker.chain import keeper
from worker.rounds import ChainClock
from worker.swarm import identity

GENERATION_SECONDS, TRAINING_SECONDS = 2.0, 1.0
"""Durations for one part of a round on the fast node."""
POLL_SECONDS = 0.2
START_SECONDS = 240.0
KEEPER = settings.Keeper(min_peers=2)


@dataclass(frozen=True)
class Kind:
    """How a node is made.

    `slowness`: factor on the durations of its work; `waits`: it waits for its peers, as before
    rounds had parts; `has_chain` False: it counts rounds by itself and never waits.
    """

    slowness: float
    waits: bool = False
    has_chain: bool = True


class SharedChain:
    """The round, and the newest round that each node has reported; shared by the processes."""

    def __init__(self, num_nodes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.round: Synchronized[int] = context.Value("q", 0)
        self.reported: list[Synchronized[int]] = [context.Value("q", -1) for _ in range(num_nodes)]
        self._began = time.monotonic()

    def current_round(self) -> int:
        return self.round.value

    def current_stage(self) -> int:
        return 0

    def advance_if_due(self) -> None:
        """End the round if the keeper would."""
        number = self.round.value
        reporters = {str(i) for i, round in enumerate(self.reported) if round.value == number}
        everyone = {str(i) for i in range(len(self.reported))}
        min_peers = {"min_peers": len(self.reported)}
        seconds = time.monotonic() - self._began
        if keeper.verdict(reporters, everyone, True, seconds, KEEPER.model_copy(update=min_peers)):
            self.round.value, self._began = number + 1, time.monotonic()


def run_node(file: Path, number: int, kind: Kind, chain: SharedChain) -> None:
    """Train until the process is ended; a line for each step is in `steps.jsonl` of its folder."""
    import torch

    from worker.environments.mixture import Mix
    from worker.node import Node
    from worker.telemetry.status import RoundRecord

    torch.set_num_threads(1)
    # Every group has a signal, so that steps differ only by the length of the answers.
    Mix.score = lambda mix, task, texts: [1.0, 0.0] * (len(texts) // 2)  # type: ignore[assignment]

    class MeasuredNode(Node):
        """Works at a fixed speed, reports each round, and writes down what it trains."""

        num_tokens = 0

        @property
        def _has_chain(self) -> bool:
            return kind.has_chain and not kind.waits

        def _save_part(self, record: RoundRecord) -> None:
            super()._save_part(record)
            if record.part == 0:
                chain.reported[number].value = record.round
            line = {"at": time.monotonic(), "tokens": self.num_tokens, "part": record.part}
            line["external"] = record.groups_external
            with (self.folder / "steps.jsonl").open("a") as steps:
                steps.write(json.dumps(line) + "\n")

    made = settings.load(file)
    node = MeasuredNode(made, *enrolment.load(made))
    if kind.has_chain:
        node.clock = ChainClock(chain, POLL_SECONDS)
    generate, step = node.policy.generate, node.trainer.step

    def slow_generate(*arguments: Any) -> Any:
        with lasting(GENERATION_SECONDS * kind.slowness):
            return generate(*arguments)

    def slow_step(*arguments: Any, **options: Any) -> Any:
        with lasting(TRAINING_SECONDS * kind.slowness):
            metrics = step(*arguments, **options)
        node.num_tokens = metrics.num_tokens
        return metrics

    node.policy.generate = slow_generate  # type: ignore[method-assign, assignment]
    node.trainer.step = slow_step  # type: ignore[method-assign]
    node.train()


@contextmanager
def lasting(seconds: float) -> Iterator[None]:
    """Prolong the block to this time."""
    started = time.monotonic()
    yield
    time.sleep(max(0.0, seconds - (time.monotonic() - started)))


def prepare(folder: Path, kinds: Sequence[Kind]) -> list[Path]:
    """Enrol a node for each kind; return their settings files. The first one is the bootnode."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    bootnodes: list[str] = []
    files: list[Path] = []
    for number, kind in enumerate(kinds):
        state = folder / f"node-{number}"
        state.mkdir()
        flat = {
            "node_state_dir": str(state),
            "node_min_free_disk_mb": 1,
            "node_max_parts_per_round": 1 if kind.waits else 256,
            "model_device": "cpu",
            "model_threads": 1,
            "environment_families": [{"name": "gcd", "level": 0}],
            "environment_tasks_per_round": 4,
            "generation_num_generations": 4,
            "generation_max_completion_length": 16,
            "generation_form": "system",
            "trainer_learning_rate": 1e-9,
            "trainer_local_groups": 2,
            "trainer_external_groups": 2,
            "swarm_enabled": len(kinds) > 1,
            "swarm_host": "127.0.0.1",
            "swarm_port": 0 if number else port,
            "swarm_bootnodes": bootnodes,
        }
        made = settings.from_flat(flat, "benchmark")
        enrolment.run(made)
        peer_id = identity.load(state / "swarm.pem").peer_id
        bootnodes = bootnodes or [f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}"]
        files.append(folder / f"node-{number}.yaml")
        files[-1].write_text(settings.dump(made))
    return files


def measure(kinds: Sequence[Kind], seconds: float) -> list[dict[str, float]]:
    """Return the figures of each node over `seconds` after all have trained once."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        files = prepare(Path(name), kinds)
        chain = SharedChain(len(kinds))
        nodes = [
            context.Process(target=run_node, args=(file, number, kind, chain), daemon=True)
            for number, (file, kind) in enumerate(zip(files, kinds, strict=True))
        ]
        for node in nodes:
            node.start()
        try:
            began = _watch(chain, nodes, START_SECONDS, until_all_reported=True)
            _watch(chain, nodes, seconds, until_all_reported=False)
        finally:
            for node in nodes:
                node.terminate()
                node.join()
        return [_figures(file.with_suffix("") / "steps.jsonl", began) for file in files]


def _watch(
    chain: SharedChain,
    nodes: Sequence[multiprocessing.process.BaseProcess],
    seconds: float,
    until_all_reported: bool,
) -> float:
    """Advance the chain for `seconds`, or until each node has trained; return time.monotonic()."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        chain.advance_if_due()
        if not all(node.is_alive() for node in nodes):
            raise SystemExit("a node has ended; its error is above")
        if until_all_reported and all(round.value >= 0 for round in chain.reported):
            return time.monotonic()
        time.sleep(POLL_SECONDS / 2)
    if until_all_reported:
        raise SystemExit(f"not all nodes trained within {seconds:.0f} s; see their log above")
    return time.monotonic()


def _figures(file: Path, began: float) -> dict[str, float]:
    """Return a node's figures per hour, from its first step after `began` to its last one."""
    steps = [step for step in map(json.loads, file.read_text().splitlines()) if step["at"] > began]
    if len(steps) < 2:
        raise SystemExit(f"{len(steps)} steps in this time; raise --seconds")
    hours, steps = (steps[-1]["at"] - steps[0]["at"]) / 3600, steps[1:]
    return {
        "tokens": sum(step["tokens"] for step in steps) / hours,
        "steps": len(steps) / hours,
        "rounds": sum(step["part"] == 0 for step in steps) / hours,
        "external": sum(step["external"] for step in steps) / len(steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slower", type=float, default=10.0, help="how many times slower")
    parser.add_argument("--seconds", type=float, default=30.0, help="to measure; more for the slow")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seconds, slower = arguments.seconds, arguments.slower
    # A node that waits takes one step in the time of the slow node's part.
    long = max(seconds, 3 * slower * (GENERATION_SECONDS + TRAINING_SECONDS))
    fast, fast_before = Kind(1), Kind(1, waits=True)
    cases = {
        "alone": ([Kind(1, has_chain=False)], seconds),
        f"next to one {slower:g} times slower": ([fast, Kind(slower)], long),
        f"next to one {slower:g} times slower, as before": (
            [fast_before, Kind(slower, waits=True)],
            long,
        ),
        "next to one of its speed": ([fast, fast], seconds),
        "next to one of its speed, as before": ([fast_before, fast_before], seconds),
    }
    print(f"{'a fast node':<40}  {'tokens/h':>9}  {'steps/h':>7}  {'rounds/h':>8}  {'theirs':>6}")
    found = {}
    for title, (kinds, duration) in cases.items():
        found[title] = row = measure(kinds, duration)[0]
        print(
            f"{title:<40}  {row['tokens']:9.0f}  {row['steps']:7.0f}  {row['rounds']:8.0f}"
            f"  {row['external']:6.2f}",
            flush=True,
        )
    claims = [
        _claim(found, f"next to one {slower:g} times slower", "alone"),
        _claim(found, f"next to one {slower:g} times slower, as before", "alone"),
        _claim(found, "next to one of its speed", "next to one of its speed, as before"),
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(claims, indent=1) + "\n")


def _claim(found: dict[str, dict[str, float]], title: str, reference: str) -> dict[str, Any]:
    ours, theirs = found[title]["steps"], found[reference]["steps"]
    tokens = found[title]["tokens"] / found[reference]["tokens"]
    print(f"{title} / {reference}: {ours / theirs:.2f} of the steps, {tokens:.2f} of the tokens")
    return {
        "claim": f"a fast node {title}, against {reference}: tokens trained an hour",
        "ours": round(found[title]["tokens"]),
        "reference": round(found[reference]["tokens"]),
        "ratio": round(tokens, 3),
        "steps_ratio": round(ours / theirs, 3),
        "unit": "tokens/h",
    }


if __name__ == "__main__":
    main()
