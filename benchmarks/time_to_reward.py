"""Measure how much sooner a node in a swarm has the reward that a node alone reaches.

    python -m benchmarks.time_to_reward [--model tiny|smollm2] [--tasks easy|hard] [--nodes 8]
                                        [--rounds 100] [--seeds 0] [--slower 10]
                                        [--plot FILE] [--json FILE]

All nodes have the same hardware and a worker's default training settings, alone or in one swarm: a
step needs as many groups that teach, and a node alone answers further tasks until it has them,
while one in a swarm has those of its peers, too. A node's time is its own processor time:
generating, scoring peers' groups and training; waiting for peers is not part of it
(benchmarks/straggler.py measures that). The reward is that of the first answers to a round's new
tasks, before the node learns from them, smoothed over WINDOW rounds. The target is SHARE of the
best reward that nodes alone ever have (mean of all nodes): the best itself is partly luck. The
result is the time at which nodes in the swarm first have the target, over the time at which nodes
alone first have it. It is missing if the swarm never has it.

With `--slower S` the last node of the swarm is S times slower than the others, and the result is
that of the slow node: its time to the target, over S times the median time of a single node alone.
Nobody waits: each node answers its next part when it is done with the last one, and takes the
groups that peers have answered by then, each once.
"""

import argparse
import heapq
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.nodes import Node, make_node, mean_curve, mean_seconds, run
from benchmarks.sapo import TASKS, Played, smollm2_flat
from worker import environments, settings
from worker.environments.presets import DEMO_SETTINGS
from worker.records import ScoredGroup

WINDOW = 10
SHARE = 0.95


def configure(model: str, tasks: str) -> settings.Settings:
    """Return a worker's default training settings for the tasks of benchmarks/sapo.py."""
    if model == "smollm2":
        return settings.from_flat(smollm2_flat(), "benchmarks.time_to_reward")
    families = [family.model_dump() for family in TASKS[tasks]]
    flat = {k: v for k, v in DEMO_SETTINGS.items() if not k.startswith("trainer_")}
    flat |= {"environment_families": families, "trainer_learning_rate": 2e-4}
    return settings.from_flat(flat, "benchmarks.time_to_reward")


def play(
    config: settings.Settings, seed: int, nodes: int, rounds: int, together: bool
) -> list[Node]:
    """Run `nodes` nodes, in one swarm or each alone."""
    if together:
        return run(seed, nodes, rounds, config)
    return [run(seed * nodes + i, 1, rounds, config)[0] for i in range(nodes)]


def mean_of(nodes: list[Node]) -> Played:
    return Played(mean_curve(nodes), mean_seconds(nodes))


def play_with_slow(
    config: settings.Settings, seed: int, nodes: int, slower: float, reward: float, limit: float
) -> float | None:
    """Return the slow node's time until its smoothed reward is at least `reward`.

    A node answers a part, then publishes it, and learns with what peers have published by then: of
    each peer the newest part, once. None: the slow node does not have the reward after `limit`
    seconds.
    """
    members = [
        make_node(seed, i, config, environments.load(config.environment)) for i in range(nodes)
    ]
    *_, slow = members
    published: dict[str, list[ScoredGroup]] = {}
    unread = {node.peer_id: dict[str, list[ScoredGroup]]() for node in members}
    events = [(0.0, number, True) for number in range(nodes)]  # time, node, whether it answers next
    while (event := heapq.heappop(events))[0] < limit:
        now, number, answers = event
        node = members[number]
        started = time.process_time()
        if answers:
            published[node.peer_id] = node.answer(len(node.rewards))
        else:
            for heard in unread.values():
                heard[node.peer_id] = published[node.peer_id]
            node.learn(published[node.peer_id], node.collect(unread[node.peer_id]))
            unread[node.peer_id].clear()
        spent = time.process_time() - started
        now += spent * (slower if node is slow else 1)
        heapq.heappush(events, (now, number, not answers))
        if node is slow and len(slow.rewards) >= WINDOW and smooth(slow.rewards)[-1] >= reward:
            return now
    return None


def smooth(rewards: Sequence[float]) -> list[float]:
    """Return the mean of each round and the WINDOW - 1 rounds before it, as far as there are."""
    return [statistics.fmean(rewards[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(rewards))]


def seconds_to(played: Played, reward: float) -> float | None:
    """Return a node's time until its smoothed reward is at least `reward`; None: it never is.

    The first WINDOW - 1 rounds do not count, as their means are of few rounds.
    """
    times = list(itertools.accumulate(played.seconds))
    for round, value in enumerate(smooth(played.rewards)):
        if round >= WINDOW - 1 and value >= reward:
            return times[round]
    return None


def target_of(alone: Played) -> float:
    return SHARE * max(smooth(alone.rewards)[WINDOW - 1 :])


def median_seconds_to(nodes: list[Node], reward: float) -> float:
    """Return the median of the nodes' own times to `reward`.

    A node that never has it counts with its whole time, which favours nodes alone.
    """
    times = [
        (seconds_to(Played(node.rewards, node.seconds), reward), sum(node.seconds))
        for node in nodes
    ]
    return statistics.median(whole if took is None else took for took, whole in times)


def draw(alone: Played, shared: Played, file: Path) -> None:
    """Write a PNG: reward over a node's processor time, alone and in the swarm."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for played, label in ((alone, "alone"), (shared, "in the swarm")):
        axes.plot(list(itertools.accumulate(played.seconds)), smooth(played.rewards), label=label)
    axes.set(
        xlabel="processor seconds of a node",
        ylabel=f"mean reward, {WINDOW} rounds",
        title="time to reward",
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["tiny", "smollm2"], default="tiny")
    parser.add_argument("--tasks", choices=["easy", "hard"], default="hard", help="of tiny")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--slower", type=float, metavar="S", help="one node is S times slower than the others"
    )
    parser.add_argument("--plot", type=Path, help="of the last seed; not with --slower")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.slower is not None and (arguments.plot or not arguments.slower >= 1):
        parser.error(f"--slower {arguments.slower:g}: expected at least 1, and no --plot")
    if arguments.rounds < WINDOW:
        parser.error(f"--rounds {arguments.rounds}: expected at least {WINDOW}")
    torch.set_num_threads(1)
    config = configure(arguments.model, arguments.tasks)
    who = "a node" if arguments.slower is None else f"a {arguments.slower:g} times slower node"
    results = []
    print(f"{'seed':>4}  {'target':>6}  {'seconds alone':>13}  {'in swarm':>8}  {'ratio':>5}")
    for seed in arguments.seeds:
        nodes = play(config, seed, arguments.nodes, arguments.rounds, together=False)
        alone = mean_of(nodes)
        reward = target_of(alone)
        if arguments.slower is None:
            needed = seconds_to(alone, reward)
            assert needed is not None  # the target is less than the best
            shared = mean_of(play(config, seed, arguments.nodes, arguments.rounds, together=True))
            took = seconds_to(shared, reward)
            if arguments.plot:
                draw(alone, shared, arguments.plot)
        else:
            needed = arguments.slower * median_seconds_to(nodes, reward)
            took = play_with_slow(config, seed, arguments.nodes, arguments.slower, reward, needed)
        ratio = None if took is None else took / needed
        print(
            f"{seed:4d}  {reward:6.3f}  {needed:13.1f}"
            f"  {'never' if took is None else format(took, '.1f'):>8}"
            f"  {'' if ratio is None else format(ratio, '.2f'):>5}",
            flush=True,
        )
        results.append(
            {
                "claim": f"{arguments.model}, seed {seed}: {who}'s time in a swarm of"
                f" {arguments.nodes} to {SHARE} of the best reward alone in {arguments.rounds}"
                " rounds",
                "ours": None if took is None else round(took, 2),
                "reference": round(needed, 2),
                "ratio": None if ratio is None else round(ratio, 3),
                "unit": "s",
            }
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
