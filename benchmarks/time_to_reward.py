"""Measure how much sooner a node in a swarm has the reward that a node alone reaches.

    python -m benchmarks.time_to_reward [--model tiny|smollm2] [--tasks easy|hard] [--nodes 8]
                                        [--rounds 100] [--seeds 0] [--slower 10 [--weights]]
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
that of the slow node: its time to the target, over S times the time of nodes alone. Nobody waits:
each node answers its next part when it is done with the last one, and takes the groups that peers
have answered by then, each once. A slow node has few rounds, so its reward, and that of the nodes
alone, is measured on held-out tasks after each round, smoothed over HELD_OUT_WINDOW rounds; the
evaluations do not count as its time. With `--weights` it may take weights of its peers, as the
nodes of one owner do by default (worker/adoption.py); the trials count as its time.
"""

import argparse
import heapq
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.nodes import Node, exchange, make_node, mean_curve, mean_seconds, run
from benchmarks.sapo import TASKS, Played, smollm2_flat
from benchmarks.weights import InProcess
from worker import environments, evaluation, settings
from worker.adoption import Adoption
from worker.environments.presets import DEMO_SETTINGS
from worker.records import ScoredGroup

WINDOW = 10
HELD_OUT_WINDOW = 3
HELD_OUT_TASKS = 24
"""Held-out tasks of each family, with two answers each."""
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


def held_out(node: Node) -> float:
    """Return the mean reward on held-out tasks of all families, the same tasks each time."""
    generation = node.settings.generation.model_copy(update={"num_generations": 2})
    asked = [(name, node.environment.levels.get(name)) for name in node.environment.names]
    policy = node.trainer.policy
    scores = evaluation.evaluate(policy, node.environment, generation, asked, HELD_OUT_TASKS)
    return evaluation.mean_reward(scores)


def play_alone(config: settings.Settings, seed: int, rounds: int) -> Played:
    """Return the held-out reward after each round of a node alone, and its times."""
    node = make_node(seed, 0, config, environments.load(config.environment))
    rewards = []
    for round in range(rounds):
        exchange([node], round)
        rewards.append(held_out(node))
    return Played(rewards, node.seconds)


def mean_played(runs: Sequence[Played]) -> Played:
    rewards = [statistics.fmean(values) for values in zip(*(p.rewards for p in runs), strict=True)]
    seconds = [statistics.fmean(values) for values in zip(*(p.seconds for p in runs), strict=True)]
    return Played(rewards, seconds)


def play_with_slow(
    members: Sequence[Node],
    slower: float,
    reward: float,
    limit: float,
    adoption: Adoption | None = None,
) -> float | None:
    """Return the last node's time until its smoothed held-out reward is at least `reward`.

    That node is `slower` times slower than the others. A node answers a part, then publishes it,
    and learns with what peers have published by then: of each peer the newest part, once.
    `adoption`: the last node's exchange of weights; None: it takes none. Returns None if it does
    not have the reward after `limit` seconds.
    """
    *_, slow = members
    published: dict[str, list[ScoredGroup]] = {}
    unread = {node.peer_id: dict[str, list[ScoredGroup]]() for node in members}
    rewards: list[float] = []
    # time, node, whether it answers next
    events = [(0.0, number, True) for number in range(len(members))]
    while (event := heapq.heappop(events))[0] < limit:
        now, number, answers = event
        node = members[number]
        started = time.process_time()
        if answers:
            published[node.peer_id] = node.answer(len(node.rewards))
        else:
            for heard in unread.values():
                heard[node.peer_id] = published[node.peer_id]
            collected = node.collect(unread[node.peer_id])
            unread[node.peer_id].clear()
            tries = adoption if node is slow else None
            if tries is not None:
                tries.before_step(published[node.peer_id], collected)
            node.learn(published[node.peer_id], collected)
            if tries is not None:
                tries.after_step()
        spent = time.process_time() - started
        now += spent * (slower if node is slow else 1)
        heapq.heappush(events, (now, number, not answers))
        if node is slow and not answers:
            rewards.append(held_out(slow))
            last = rewards[-HELD_OUT_WINDOW:]
            if len(last) == HELD_OUT_WINDOW and statistics.fmean(last) >= reward:
                return now
    return None


def smooth(rewards: Sequence[float], window: int = WINDOW) -> list[float]:
    """Return the mean of each round and the `window` - 1 rounds before it, as far as there are."""
    return [statistics.fmean(rewards[max(0, i + 1 - window) : i + 1]) for i in range(len(rewards))]


def seconds_to(played: Played, reward: float, window: int = WINDOW) -> float | None:
    """Return a node's time until its smoothed reward is at least `reward`; None: it never is.

    The first `window` - 1 rounds do not count, as their means are of few rounds.
    """
    times = list(itertools.accumulate(played.seconds))
    for round, value in enumerate(smooth(played.rewards, window)):
        if round >= window - 1 and value >= reward:
            return times[round]
    return None


def target_of(alone: Played, window: int = WINDOW) -> float:
    return SHARE * max(smooth(alone.rewards, window)[window - 1 :])


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


def measure(
    config: settings.Settings, seed: int, arguments: argparse.Namespace
) -> tuple[float, float, float | None]:
    """Return the target and the seconds to it, of nodes alone and of nodes in a swarm."""
    alone = mean_of(play(config, seed, arguments.nodes, arguments.rounds, together=False))
    reward = target_of(alone)
    needed = seconds_to(alone, reward)
    assert needed is not None  # the target is less than the best
    shared = mean_of(play(config, seed, arguments.nodes, arguments.rounds, together=True))
    if arguments.plot:
        draw(alone, shared, arguments.plot)
    return reward, needed, seconds_to(shared, reward)


def measure_slow(
    config: settings.Settings, seed: int, arguments: argparse.Namespace
) -> tuple[float, float, float | None]:
    """Return the target and the seconds to it, of a slow node alone and in a swarm."""
    seeds = [seed * arguments.nodes + number for number in range(arguments.nodes)]
    alone = mean_played([play_alone(config, each, arguments.rounds) for each in seeds])
    reward = target_of(alone, HELD_OUT_WINDOW)
    fast = seconds_to(alone, reward, HELD_OUT_WINDOW)
    assert fast is not None  # the target is less than the best
    needed = arguments.slower * fast
    members = [
        make_node(seed, number, config, environments.load(config.environment))
        for number in range(arguments.nodes)
    ]
    with tempfile.TemporaryDirectory() as folder:
        adoption = adoption_of(members, Path(folder)) if arguments.weights else None
        took = play_with_slow(members, arguments.slower, reward, needed, adoption)
    return reward, needed, took


def adoption_of(members: Sequence[Node], folder: Path) -> Adoption:
    """Return the exchange of weights of the last node, with the others in this process."""
    swarm, slow = InProcess({node.peer_id: node for node in members}, folder), members[-1]
    generation = slow.settings.generation
    return Adoption(
        swarm,  # type: ignore[arg-type]
        slow.trainer,
        slow.environment,
        generation,
        folder,
    )


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
    parser.add_argument("--weights", action="store_true", help="the slow node may take weights")
    parser.add_argument("--plot", type=Path, help="of the last seed; not with --slower")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.slower is not None and (arguments.plot or not arguments.slower >= 1):
        parser.error(f"--slower {arguments.slower:g}: expected at least 1, and no --plot")
    if arguments.weights and arguments.slower is None:
        parser.error("--weights: expected together with --slower")
    if arguments.rounds < WINDOW:
        parser.error(f"--rounds {arguments.rounds}: expected at least {WINDOW}")
    torch.set_num_threads(1)
    config = configure(arguments.model, arguments.tasks)
    who = "a node" if arguments.slower is None else f"a {arguments.slower:g} times slower node"
    results = []
    print(f"{'seed':>4}  {'target':>6}  {'seconds alone':>13}  {'in swarm':>8}  {'ratio':>5}")
    for seed in arguments.seeds:
        if arguments.slower is None:
            reward, needed, took = measure(config, seed, arguments)
        else:
            reward, needed, took = measure_slow(config, seed, arguments)
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
