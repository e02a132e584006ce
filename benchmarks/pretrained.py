"""Measure whether a pre-trained model learns, with two models that need no model hub.

    python -m benchmarks.pretrained FOLDER [--rounds 10] [--nodes 2] [--seeds 0 1 2] [--json FILE]
    python -m benchmarks.pretrained --model smollm2 [FOLDER] [--small] [--rounds 40] [--nodes 1]
                                    [--seeds 0 1 2] [--without form level credit]
                                    [--plot FILE] [--json FILE]

scripts/pretrained_model.py fetches both models.

FOLDER contains stories15M, a model that writes stories; it is loaded by its path, as a user's own
model would be. A task is the beginning of a story to continue. The reward measures how joyful the
story is: four joyful words earn the full reward. The environment is a class in this file; policy,
generation, sampler and trainer are the worker's own. Nodes learn from their own groups and from
each other's. Exits 1 if a seed gains less than 0.1.

smollm2 is SmolLM2-135M-Instruct with a worker's default settings, which set only the model's name.
The result is the mean reward on held-out tasks of three families at their easiest level, before
training and after the rounds, both with the prompt form that the node found. Exits 1 if a seed
gains less than 0.15, or takes its first step after the third round. `--small` is a short version
that takes a few minutes. `--without` disables parts to measure their effect: the form that was
found (the default form is used), levels (the families' own configuration is used), or the credit
for closed tags.
"""

import argparse
import hashlib
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from transformers.utils.logging import set_verbosity_error

from benchmarks.nodes import GAIN_HEADER, Node, exchange, make_node, mean_curve, print_gain, run
from worker import environments, evaluation, settings
from worker.policy import form_choice
from worker.records import MAX_PART_TASKS, ScoredGroup, Task

ROOT = Path(__file__).parents[1]
HELD_OUT_FAMILIES = ("basic_arithmetic", "leg_counting", "calendar_arithmetic")
HELD_OUT_GAIN = 0.15
FIRST_STEP = 3
WINDOW = 2
WANTED_GAIN = 0.1

NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue")
THINGS = ("dog", "cat", "ball", "tree", "boat", "bird", "car", "hat", "fish", "flower")
PLACES = ("in the park", "at home", "by the sea", "in the garden", "at school", "in the forest")
JOY = {
    "happy",
    "smiled",
    "laughed",
    "fun",
    "love",
    "loved",
    "hugged",
    "play",
    "played",
    "friend",
    "friends",
    "kind",
}
ENOUGH_JOY = 4


class Stories:
    """Environment with one family of tasks: beginnings of stories to continue."""

    versions = ("stories 1",)
    families = ("stories",)
    levels: ClassVar[dict[str, int]] = {}

    def __init__(self, environment: settings.Environment) -> None:
        """Ignore the settings: there is nothing to configure."""

    def sample(self, seed: int, count: int, part: int = 0) -> list[Task]:
        digest = hashlib.sha256(b"stories").hexdigest()[:12]
        first = part * MAX_PART_TASKS
        return [Task("stories", digest, seed, first + index) for index in range(count)]

    def question(self, task: Task) -> str:
        rng = random.Random(f"{task.seed} {task.index}")
        return (
            f"Once upon a time, {rng.choice(NAMES)} saw a {rng.choice(THINGS)}"
            f" {rng.choice(PLACES)}."
        )

    def score(self, task: Task, completions: Sequence[str]) -> list[float]:
        joyful = [
            sum(word in JOY for word in re.findall(r"[a-z]+", text.lower())) for text in completions
        ]
        return [min(1.0, count / ENOUGH_JOY) for count in joyful]

    def learn(self, groups: Sequence[ScoredGroup]) -> None:
        """Do nothing: there is no curriculum."""

    def state(self) -> dict[str, Any]:
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state to restore."""


def make_settings(folder: Path) -> settings.Settings:
    return settings.from_flat(
        {
            "model_name": str(folder),
            "model_device": "cpu",
            "environment_tasks_per_round": 8,
            "generation_num_generations": 8,
            "generation_max_prompt_length": 96,
            "generation_max_completion_length": 64,
            "trainer_learning_rate": 5e-5,
            "trainer_local_groups": 4,
            "trainer_external_groups": 4,
        },
        "benchmarks.pretrained",
    )


def smollm2_settings(
    folder: Path, without: Sequence[str], more: dict[str, Any]
) -> settings.Settings:
    flat: dict[str, Any] = {"model_name": str(folder), "model_device": "cpu", **more}
    if "form" in without:
        flat["generation_form"] = "system"
    if "level" in without:
        flat["environment_families"] = [{"name": name} for name in settings.DEFAULT_FAMILIES]
    return settings.from_flat(flat, "benchmarks.pretrained")


def find_smollm2(folder: Path | None) -> Path:
    folder = folder or ROOT / ".cache" / "smollm2"
    if not (folder / "config.json").exists():
        command = [
            sys.executable,
            str(ROOT / "scripts" / "pretrained_model.py"),
            "--model",
            "smollm2",
        ]
        subprocess.run([*command, "--output", str(folder)], check=True)
    return folder


def settle_form(node: Node, folder: Path) -> None:
    """Set the prompt form, as a worker does at its first start."""
    environment = node.environment
    tasks = environment.easy_tasks(evaluation.HELD_OUT, form_choice.NUM_QUESTIONS)
    form_choice.settle(
        node.trainer.policy,
        node.settings.generation,
        [environment.question(task) for task in tasks],
        lambda number, texts: environment.score(tasks[number], texts),
        folder / "form.json",
    )


def held_out(node: Node, tasks_each: int) -> float:
    """Return the mean reward on held-out tasks, sampled as in training.

    Many tasks with few answers each give a more precise mean than few tasks with many answers.
    """
    generation = node.settings.generation.model_copy(update={"num_generations": 2})
    asked = [(name, 0) for name in HELD_OUT_FAMILIES]
    scores = evaluation.evaluate(
        node.trainer.policy, node.environment, generation, asked, tasks_each
    )
    print(
        "    " + ", ".join(f"{score.family} {score.reward.value:.3f}" for score in scores),
        flush=True,
    )
    return evaluation.mean_reward(scores)


def train_smollm2(
    seed: int, arguments: argparse.Namespace, config: settings.Settings
) -> dict[str, Any]:
    """Train one seed; return its held-out reward before and after, and its reward by round."""
    nodes = [
        make_node(seed, i, config, environments.load(config.environment))
        for i in range(arguments.nodes)
    ]
    with TemporaryDirectory() as folder:
        for node in nodes:
            node.has_credit = "credit" not in arguments.without
            settle_form(node, Path(folder))
    tasks_each = 24 if arguments.small else 64
    started = time.monotonic()
    before = held_out(nodes[0], tasks_each)
    measured = {0: before}
    for round in range(arguments.rounds):
        exchange(nodes, round)
        rewards = [f"{node.rewards[-1]:.3f}" for node in nodes]
        print(
            f"    round {round:2d} reward {' '.join(rewards)} step {nodes[0].steps[-1]} "
            f"{time.monotonic() - started:.0f} s, {time.process_time():.0f} s of the processor",
            flush=True,
        )
        if arguments.every and (round + 1) % arguments.every == 0 and round + 1 < arguments.rounds:
            measured[round + 1] = held_out(nodes[0], tasks_each)
    after = measured[arguments.rounds] = held_out(nodes[0], tasks_each)
    first = next((i + 1 for i, stepped in enumerate(nodes[0].steps) if stepped), None)
    return {
        "before": before,
        "after": after,
        "first": first,
        "curve": mean_curve(nodes),
        "held_out": measured,
        "form": nodes[0].trainer.policy.form.name,
        "levels": nodes[0].environment.levels,
    }


def run_smollm2(arguments: argparse.Namespace) -> None:
    more = dict(item.split("=", 1) for item in arguments.set)
    config = smollm2_settings(
        find_smollm2(arguments.folder),
        arguments.without,
        {key: json.loads(value) for key, value in more.items()},
    )
    arguments.rounds = arguments.rounds or (8 if arguments.small else 40)
    arguments.nodes = arguments.nodes or 1
    results: list[dict[str, Any]] = []
    short: list[int] = []
    runs: dict[int, dict[str, Any]] = {}
    for seed in arguments.seeds or ([0] if arguments.small else [0, 1, 2]):
        found = runs[seed] = train_smollm2(seed, arguments, config)
        before, after = found["before"], found["after"]
        print(
            f"seed {seed}: held-out reward {before:.3f} before, {after:.3f} after"
            f" {arguments.rounds} rounds; form {found['form']}, first step in round"
            f" {found['first']}, levels {found['levels']}",
            flush=True,
        )
        what = f"SmolLM2-135M-Instruct, seed {seed}"
        results += [
            {
                "claim": f"{what}: held-out reward after {arguments.rounds} rounds",
                "ours": round(after, 4),
                "reference": round(before, 4),
                "ratio": round(after / before, 3) if before else None,
                "unit": "reward",
            },
            {
                "claim": f"{what}: round of the first step",
                "ours": found["first"],
                "reference": FIRST_STEP,
                "ratio": round(found["first"] / FIRST_STEP, 3) if found["first"] else None,
                "unit": "round",
            },
        ]
        if after - before < HELD_OUT_GAIN or found["first"] is None or found["first"] > FIRST_STEP:
            short.append(seed)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.plot:
        draw_smollm2(runs, arguments.plot)
    if short and not arguments.without and not arguments.small:
        raise SystemExit(
            f"seeds {short}: gain under {HELD_OUT_GAIN}, or no step in the first {FIRST_STEP}"
            " rounds"
        )


def draw_smollm2(runs: dict[int, dict[str, Any]], file: Path) -> None:
    """Write a PNG: held-out reward, and the five-round mean of the training reward, by seed."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for seed, found in runs.items():
        points, curve = found["held_out"], found["curve"]
        (line,) = axes.plot(list(points), list(points.values()), "o-", label=f"seed {seed}")
        smooth = [statistics.fmean(curve[max(0, i - 4) : i + 1]) for i in range(len(curve))]
        axes.plot(range(1, len(curve) + 1), smooth, color=line.get_color(), alpha=0.35)
    axes.set(
        xlabel="round",
        ylabel="mean reward",
        title="SmolLM2-135M-Instruct, default settings, one node\n"
        "points: held-out tasks of three families; faint: training, mean of five rounds",
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", nargs="?")
    parser.add_argument("--model", choices=["stories15m", "smollm2"], default="stories15m")
    parser.add_argument("--small", action="store_true", help="smollm2: a few minutes on two cores")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--without", nargs="+", default=[], choices=["form", "level", "credit"])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=JSON", help="smollm2: depart from the defaults"
    )
    parser.add_argument("--every", type=int, help="smollm2: held-out reward every N rounds, too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="smollm2: such as docs/images/smollm2.png")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    if arguments.model == "smollm2":
        run_smollm2(arguments)
    elif arguments.folder is None:
        parser.error("expected the FOLDER of stories15M, or --model smollm2")
    else:
        run_stories(arguments)


def run_stories(arguments: argparse.Namespace) -> None:
    config = make_settings(arguments.folder)
    num_nodes, rounds = arguments.nodes or 2, arguments.rounds or 10
    results, short = [], []
    print(f"{num_nodes} nodes, {rounds} rounds; mean reward of the first and the last {WINDOW}")
    print(GAIN_HEADER)
    for seed in arguments.seeds or [0, 1, 2]:
        started = time.monotonic()
        curve = mean_curve(run(seed, num_nodes, rounds, config, Stories))
        gain, claim = print_gain(
            arguments.folder.name, seed, curve, WINDOW, time.monotonic() - started
        )
        results.append(claim)
        if gain < WANTED_GAIN:
            short.append(seed)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if short:
        raise SystemExit(f"seeds {short}: gain under {WANTED_GAIN}")


if __name__ == "__main__":
    main()
