"""Measure whether sharing helps: the controlled experiment of SAPO (arXiv 2509.08721).

    python -m benchmarks.sapo [--tasks easy|hard] [--external better|all] [--mixes 8/0 6/2 4/4 2/6]
                              [--nodes 8] [--rounds 200] [--seeds 0 1 2] [--processes 2]
                              [--plot FILE] [--json FILE]
    python -m benchmarks.sapo --model smollm2 [--small] [--mixes 4/0 4/4 4/28] ...

Nodes train on groups of their own (I) and of their peers (J), a mix "I/J". Every node answers the
same number of tasks with each mix. The metric is the paper's: reward accumulated over all nodes and
rounds. Model, tasks and number of rounds differ from the paper's (its model is Qwen2.5-0.5B), so
compare the ratios to the first mix, not the sums.

With the model that comes with the package, `hard` tasks are mostly out of its reach, as in the
paper: two in three of a node's own groups have equal rewards and give no signal. `easy` is the
demo's mix, where nine in ten of a node's own groups have a signal.

`--model smollm2` trains SmolLM2-135M-Instruct with default training settings, from the untouched
model, on the easiest tasks of four families. One example in the prompt makes one answer in sixty
right, so as in the paper most of a node's own groups have no signal at first. A node answers four
tasks a round (`--small`: two, in eight rounds; half an hour on one core).
"""

import argparse
import json
import multiprocessing
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks.nodes import mean_curve, mean_seconds, run
from benchmarks.pretrained import find_smollm2
from worker import settings
from worker.environments.presets import DEMO_FAMILIES, DEMO_SETTINGS
from worker.settings import Family

PAPER = {"8/0": 561.79, "6/2": 854.43, "4/4": 1093.31, "2/6": 945.87}
"""Cumulative reward by mix, from table 1 of the paper."""
TASKS = {
    "easy": DEMO_FAMILIES,
    "hard": (
        Family(
            name="chain_sum",
            config={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
        ),
        Family(
            name="chain_sum",
            config={"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        ),
        Family(
            name="basic_arithmetic",
            config={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
        ),
        Family(name="count_bits", config={"max_n": 4095}),
        Family(
            name="gcd",
            config={"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 200},
        ),
    ),
}


SMOLLM2_FAMILIES = ("basic_arithmetic", "chain_sum", "leg_counting", "calendar_arithmetic")


@dataclass(frozen=True)
class Trial:
    """Parameters of one run.

    `mix`: local and external groups, as "I/J". `external`: the completions of peers' groups that
    are trained on (`trainer.external_completions`).
    """

    mix: str
    tasks: str
    external: str
    seed: int
    nodes: int
    rounds: int
    model: str = "tiny"
    tasks_per_round: int = 8


@dataclass(frozen=True)
class Played:
    """The result of a trial, by round: mean reward and mean processor seconds of a node."""

    rewards: list[float]
    seconds: list[float]


def configure(mix: str, tasks: str, external: str) -> settings.Settings:
    """Return the demo's settings with I local and J external groups.

    Missing groups are not replaced by others (`trainer.fill_missing`).
    """
    num_local, num_external = map(int, mix.split("/"))
    flat = {
        **DEMO_SETTINGS,
        "environment_families": [family.model_dump() for family in TASKS[tasks]],
        "trainer_local_groups": num_local,
        "trainer_external_groups": num_external,
        "trainer_external_completions": external,
        "trainer_fill_missing": False,
        "node_max_parts_per_step": 1,  # mixes are compared at equal numbers of tasks
    }
    return settings.from_flat(flat, "the demo's settings")


def smollm2_flat() -> dict[str, Any]:
    """Return flat settings for SmolLM2 with the prompt form that nodes find for it.

    Levels are fixed, so that all nodes train and are measured on the same tasks.
    """
    return {
        "model_name": str(find_smollm2(None)),
        "model_device": "cpu",
        "generation_form": "three-examples",
        "generation_max_completion_length": 80,
        "environment_families": [{"name": name, "level": 0} for name in SMOLLM2_FAMILIES],
    }


def configure_smollm2(
    mix: str, tasks_per_round: int = 2, external: str = "all"
) -> settings.Settings:
    """Return default training settings for SmolLM2, with I local and J external groups."""
    num_local, num_external = map(int, mix.split("/"))
    flat = {
        **smollm2_flat(),
        "generation_form": "example",
        "generation_max_completion_length": 64,
        "environment_tasks_per_round": tasks_per_round,
        "trainer_local_groups": num_local,
        "trainer_external_groups": num_external,
        "trainer_external_completions": external,
        "trainer_fill_missing": False,
        "node_max_parts_per_step": 1,  # mixes are compared at equal numbers of tasks
    }
    return settings.from_flat(flat, "benchmarks.sapo")


def play(trial: Trial) -> Played:
    """Run one trial on one core."""
    torch.set_num_threads(1)
    if trial.model == "tiny":
        config = configure(trial.mix, trial.tasks, trial.external)
    else:
        config = configure_smollm2(trial.mix, trial.tasks_per_round, trial.external)
    nodes = run(trial.seed, trial.nodes, trial.rounds, config)
    return Played(mean_curve(nodes), mean_seconds(nodes))


def cumulate(curve: list[float], nodes: int) -> list[float]:
    total, sums = 0.0, []
    for mean in curve:
        total += mean * nodes
        sums.append(total)
    return sums


def draw(curves: dict[str, list[list[float]]], nodes: int, file: Path) -> None:
    """Plot the reward by round (left) and the reward accumulated above the first mix (right)."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    means = {
        mix: [statistics.fmean(values) for values in zip(*runs, strict=True)]
        for mix, runs in curves.items()
    }
    for mix, mean in means.items():
        smooth = [statistics.fmean(mean[max(0, i - 9) : i + 1]) for i in range(len(mean))]
        left.plot(smooth, label=mix)
    first = next(iter(means))
    base = cumulate(means[first], nodes)
    for mix, mean in means.items():
        right.plot([a - b for a, b in zip(cumulate(mean, nodes), base, strict=True)], label=mix)
    left.set(xlabel="round", ylabel="mean reward (10-round mean, all seeds)", ylim=(0, 1))
    right.set(xlabel="round", ylabel=f"accumulated reward above {first}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(title="local/external")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["tiny", "smollm2"], default="tiny")
    parser.add_argument("--small", action="store_true", help="smollm2: fewer tasks and rounds")
    parser.add_argument("--tasks", choices=list(TASKS), default="easy", help="of the tiny model")
    parser.add_argument("--external", choices=["better", "all"], help="which of peers' completions")
    parser.add_argument("--mixes", nargs="+", metavar="I/J", help="the first is the base")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument(
        "--processes", type=int, default=2, help="runs at the same time; each takes one core"
    )
    parser.add_argument("--plot", type=Path, help="such as docs/images/sapo.png")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.model == "tiny":
        defaults = {"mixes": list(PAPER), "rounds": 200, "seeds": [0, 1, 2], "external": "better"}
        arguments.tasks_per_round = 8
    else:
        own = arguments.tasks_per_round = 2 if arguments.small else 4
        mixes = [f"{own}/0", f"{own}/{(arguments.nodes - 1) * own}"]
        rounds = 8 if arguments.small else 40
        defaults = {"mixes": mixes, "rounds": rounds, "seeds": [0], "external": "better"}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for mix in arguments.mixes:
        if not re.fullmatch(r"\d+/\d+", mix):
            parser.error(f"--mixes {mix}: expected local/external groups, such as 4/4")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    mixes, nodes, rounds = arguments.mixes, arguments.nodes, arguments.rounds
    trials = [
        Trial(
            mix,
            arguments.tasks,
            arguments.external,
            seed,
            nodes,
            rounds,
            arguments.model,
            arguments.tasks_per_round,
        )
        for seed in arguments.seeds
        for mix in mixes
    ]
    curves: dict[str, list[list[float]]] = {mix: [] for mix in mixes}
    tasks = f"{arguments.tasks} tasks" if arguments.model == "tiny" else arguments.model
    setting = f"{tasks}, external {arguments.external}, {nodes} nodes, {rounds} rounds"
    print(f"accumulated reward by seed; {setting}", flush=True)
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for trial, played in zip(trials, pool.imap(play, trials), strict=True):
            curves[trial.mix].append(played.rewards)
            total = cumulate(played.rewards, trial.nodes)[-1]
            minutes = (time.monotonic() - started) / 60
            print(
                f"seed {trial.seed}  {trial.mix}  {total:8.1f}"
                f"  {statistics.fmean(played.seconds):5.1f} s a round and node"
                f"  after {minutes:5.1f} min",
                flush=True,
            )

    totals = {mix: [cumulate(curve, nodes)[-1] for curve in runs] for mix, runs in curves.items()}
    base = statistics.fmean(totals[mixes[0]])
    ratio = f"to {mixes[0]}"
    print(
        f"{'mix':>4}  {'accumulated':>11}  {'spread':>6}  {ratio:>6}  {'last ten':>8}  {'paper':>8}"
        f"  {'to 8/0':>6}"
    )
    results = []
    for mix in mixes:
        mean = statistics.fmean(totals[mix])
        spread = statistics.stdev(totals[mix]) if len(totals[mix]) > 1 else 0.0
        last = statistics.fmean(statistics.fmean(curve[-10:]) for curve in curves[mix])
        paper = f"{PAPER[mix]:8.2f}  {PAPER[mix] / PAPER['8/0']:6.2f}" if mix in PAPER else ""
        print(f"{mix:>4}  {mean:11.1f}  {spread:6.1f}  {mean / base:6.3f}  {last:8.3f}  {paper}")
        results.append(
            {
                "claim": f"accumulated reward, {setting}: {mix} to {mixes[0]}",
                "ours": round(mean, 2),
                "reference": round(base, 2),
                "ratio": round(mean / base, 4),
                "unit": "reward",
            }
        )
    if arguments.plot:
        draw(curves, nodes, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
