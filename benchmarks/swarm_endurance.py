"""Many rounds of real nodes with frequent kills: no node stops or hangs, memory stays flat.

    python -m benchmarks.swarm_endurance [--nodes 8] [--rounds 1000] [--kill-every 10] [--json FILE]

Every few rounds one node, or its libp2p daemon, gets SIGKILL in the middle of the round. A killed
node is started again, as systemd does; a node restarts its own daemon. Two nodes are never killed:
their memory, threads and open files are tracked from the first round to the last. Exits 1 if a node
stops by itself or hangs, or if these figures grow by more than a tenth over the second half of the
rounds.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from benchmarks.swarm_nodes import daemons_of, memory_mb
from benchmarks.swarm_sides import OURS, Running, Side, in_own_namespace
from worker import log, settings

NUM_WITNESSES = 2
PATIENCE_SECONDS = settings.Swarm().collect_timeout_seconds + 30
"""Limit after which a node counts as hanging: an exchange may take collect_timeout_seconds."""
PAUSE_SECONDS = 0.25
SHOW_EVERY = 50
START_SECONDS = 600.0
"""Seconds for a restarted node, which imports torch on a possibly busy machine."""
SLOW_SECONDS = 15.0
FLAT = 1.1
NUM_ANSWERS = 2  # to "prepare" and to "take_part"


@dataclass
class Watch:
    """Records of all rounds. `kills`: number by kind. `alone`: rounds without a group, by cause."""

    seconds: list[float] = field(default_factory=list)
    kills: "Counter[str]" = field(default_factory=Counter)
    alone: "Counter[str]" = field(default_factory=Counter)
    stopped: int = 0
    hung: int = 0
    witnesses: list[dict[str, float]] = field(default_factory=list)


def run(side: Side, rounds: int, kill_every: int, rng: random.Random, watch: Watch) -> None:
    killed: dict[Running, int] = {}
    for round in range(rounds):
        victim = (
            rng.choice(side.nodes[NUM_WITNESSES:]) if round % kill_every == kill_every - 1 else None
        )
        if victim is not None:
            killed[victim] = round
        got = play(side.nodes, round, victim, rng, watch)
        if watch.seconds[-1] > SLOW_SECONDS:
            print(
                f"round {round} took {watch.seconds[-1]:.1f} s, groups {list(got.values())}",
                flush=True,
            )
        for node, groups in got.items():
            if not groups:
                since = round - killed.get(node, -rounds)
                watch.alone["killed in the last 10 rounds" if since < 10 else "others"] += 1
        watch.witnesses.append(look_at(side.nodes[:NUM_WITNESSES]))
        if round % SHOW_EVERY == SHOW_EVERY - 1:
            show(watch)
        time.sleep(PAUSE_SECONDS)


def play(
    nodes: list[Running], round: int, victim: Running | None, rng: random.Random, watch: Watch
) -> dict[Running, int]:
    """Run one round; return the groups of each node. Nodes that end by themselves are restarted."""
    started = time.monotonic()
    for node in nodes:
        node.pipe.send(("prepare", round))
        node.pipe.send(("take_part", round))
    killed = None
    if victim is not None:
        time.sleep(rng.uniform(0, 0.2))
        killed = kill(victim, rng)
        watch.kills[killed] += 1
    answers, ended = await_answers(nodes)
    watch.seconds.append(time.monotonic() - started)
    for node in ended:
        watch.stopped += node is not victim or killed != "node"
        restart(node)
    if killed == "node" and victim is not None and victim not in ended:
        restart(victim)  # it had answered before it was killed
    for node in nodes:
        is_gone = node in ended or (node is victim and killed == "node")
        if not is_gone and len(answers[node]) < NUM_ANSWERS:
            watch.hung += 1
            os.kill(node.pid, signal.SIGKILL)
            restart(node)
    return {node: answer[1] for node, answer in answers.items() if len(answer) == NUM_ANSWERS}


def await_answers(nodes: list[Running]) -> tuple[dict[Running, list[int]], list[Running]]:
    """Return each node's answer within PATIENCE_SECONDS, and the nodes that ended."""
    waiting = {node.pipe: node for node in nodes}
    answers: dict[Running, list[int]] = {node: [] for node in nodes}
    ended = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), left):
            assert isinstance(pipe, Connection)
            node = waiting[pipe]
            try:
                answers[node].append(pipe.recv())
            except (EOFError, ConnectionResetError):
                ended.append(node)
            if node in ended or len(answers[node]) == NUM_ANSWERS:
                del waiting[pipe]
    return answers, ended


def kill(victim: Running, rng: random.Random) -> str:
    daemons = daemons_of(victim.pid)
    if daemons and rng.random() < 0.5:
        os.kill(daemons[0], signal.SIGKILL)
        return "daemon"
    os.kill(victim.pid, signal.SIGKILL)
    return "node"


def restart(node: Running) -> None:
    node.close()
    node.start()
    if not node.pipe.poll(START_SECONDS):
        raise SystemExit("a restarted node was not ready in time; its output is above")
    node.pipe.recv()


def look_at(nodes: list[Running]) -> dict[str, float]:
    """Return the mean of the nodes."""
    pids = [node.pid for node in nodes]
    return {
        "Python MB": statistics.fmean(memory_mb(pid) for pid in pids),
        "daemon MB": statistics.fmean(
            memory_mb(daemon) for pid in pids for daemon in daemons_of(pid)
        ),
        "threads": statistics.fmean(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in pids),
        "open files": statistics.fmean(
            len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids
        ),
    }


def tenths(watch: Watch, name: str) -> list[float]:
    """Return the means of a figure over each tenth of the rounds."""
    values, count = [w[name] for w in watch.witnesses], len(watch.witnesses)
    parts = [values[count * i // 10 : count * (i + 1) // 10] for i in range(10)]
    return [round(statistics.fmean(part), 1) for part in parts if part]


def show(watch: Watch) -> None:
    latest = " ".join(f"{name} {value:.1f}" for name, value in watch.witnesses[-1].items())
    print(
        f"{time.strftime('%H:%M:%S')} rounds {len(watch.seconds)} kills {dict(watch.kills)} stopped"
        f" {watch.stopped} hung {watch.hung} alone {dict(watch.alone)} median"
        f" {statistics.median(watch.seconds):.2f} s longest {max(watch.seconds):.1f} s; witnesses:"
        f" {latest}",
        flush=True,
    )


def claims(watch: Watch) -> list[dict[str, object]]:
    """A row of results; for witnesses `reference` is the value in the fifth tenth of the rounds."""
    rounds, kills = len(watch.seconds), sum(watch.kills.values())
    rows: list[tuple[str, float, float | None, str]] = [
        ("rounds", rounds, 1000, "rounds"),
        ("nodes and daemons killed", kills, rounds // 10, "kills"),
        ("nodes that stopped by themselves", watch.stopped, 0, "nodes"),
        ("nodes that hung", watch.hung, 0, "nodes"),
        (
            "nodes' rounds without a group, though not killed lately",
            watch.alone["others"],
            0,
            "rounds",
        ),
        ("median round", statistics.median(watch.seconds), None, "s"),
        ("longest round", max(watch.seconds), PATIENCE_SECONDS, "s"),
    ]
    for name in watch.witnesses[0]:
        means = tenths(watch, name)
        rows.append(
            (
                f"node that is never killed: {name}, last tenth",
                means[-1],
                means[len(means) // 2 - 1],
                name,
            )
        )
    return [
        {
            "claim": f"endurance: {what}",
            "ours": round(ours, 3),
            "reference": reference,
            "ratio": round(reference / ours, 2) if reference and ours else None,
            "unit": unit,
        }
        for what, ours, reference, unit in rows
    ]


def growing(watch: Watch) -> list[str]:
    """Return figures of witnesses that grew from the fifth to the last tenth by more than FLAT."""
    means = {name: tenths(watch, name) for name in watch.witnesses[0]}
    return [
        name for name, values in means.items() if values[-1] > FLAT * values[len(values) // 2 - 1]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--kill-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.inside:
        sys.exit(in_own_namespace("benchmarks.swarm_endurance", ["--inside", *sys.argv[1:]]).wait())
    log.setup("ERROR", "text")
    watch = Watch()
    with ExitStack() as stack:
        side = Side(OURS, arguments.nodes, stack)
        try:
            run(side, arguments.rounds, arguments.kill_every, random.Random(arguments.seed), watch)
        finally:
            if watch.seconds:
                for name in watch.witnesses[0]:
                    print(
                        f"{name} of those that are never killed, by tenths of the run:"
                        f" {tenths(watch, name)}"
                    )
                result = claims(watch)
                for row in result:
                    print(f"{row['claim']}: {row['ours']} {row['unit']}")
                if arguments.json:
                    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if watch.stopped or watch.hung or growing(watch) else 0)


if __name__ == "__main__":
    main()
