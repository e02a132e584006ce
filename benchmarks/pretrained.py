"""Does a real pre-trained model of another family learn? Its mean reward, before and after a few rounds.

    python scripts/pretrained_model.py --output FOLDER
    python -m benchmarks.pretrained FOLDER [--rounds 10] [--nodes 2] [--seeds 0 1 2] [--json FILE]

Nothing about the model is known beforehand: it is loaded by its path as a user's own would be. What it is asked is made
for models that tell stories, a beginning to go on with; the reward is how joyful the story is, four words of joy for
all of it. The environment is a class of this file, the rest the worker's own: policy, generation, sampler, trainer;
nodes learn from their own groups and each other's. Exits 1 if a seed gains less than 0.1.
"""

import argparse
import hashlib
import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.utils.logging import set_verbosity_error

from benchmarks.nodes import GAIN_HEADER, mean_curve, print_gain, run
from worker import settings
from worker.records import ScoredGroup, Task

WINDOW = 2
WANTED_GAIN = 0.1

NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue")
THINGS = ("dog", "cat", "ball", "tree", "boat", "bird", "car", "hat", "fish", "flower")
PLACES = ("in the park", "at home", "by the sea", "in the garden", "at school", "in the forest")
JOY = {"happy", "smiled", "laughed", "fun", "love", "loved", "hugged", "play", "played", "friend", "friends", "kind"}
ENOUGH_JOY = 4


class Stories:
    """An environment with one family of tasks: beginnings of stories."""

    versions = ("stories 1",)
    families = ("stories",)
    levels: ClassVar[dict[str, int]] = {}

    def __init__(self, environment: settings.Environment) -> None:
        """There is nothing to set."""

    def sample(self, seed: int, count: int) -> list[Task]:
        digest = hashlib.sha256(b"stories").hexdigest()[:12]
        return [Task("stories", digest, seed, index) for index in range(count)]

    def question(self, task: Task) -> str:
        rng = random.Random(f"{task.seed} {task.index}")
        return f"Once upon a time, {rng.choice(NAMES)} saw a {rng.choice(THINGS)} {rng.choice(PLACES)}."

    def score(self, task: Task, completions: Sequence[str]) -> list[float]:
        joyful = [sum(word in JOY for word in re.findall(r"[a-z]+", text.lower())) for text in completions]
        return [min(1.0, count / ENOUGH_JOY) for count in joyful]

    def learn(self, groups: Sequence[ScoredGroup]) -> None:
        """There is no curriculum."""

    def state(self) -> dict[str, Any]:
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""


def make_settings(folder: Path) -> settings.Settings:
    return settings.from_flat(
        {
            "model_name": str(folder), "model_device": "cpu", "environment_tasks_per_round": 8,
            "generation_num_generations": 8, "generation_max_prompt_length": 96,
            "generation_max_completion_length": 64, "trainer_learning_rate": 5e-5,
            "trainer_local_groups": 4, "trainer_external_groups": 4,
        },
        "benchmarks.pretrained",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    set_verbosity_error()
    torch.set_num_threads(2)
    config = make_settings(arguments.model)
    results, short = [], []
    print(f"{arguments.nodes} nodes, {arguments.rounds} rounds; mean reward of the first and the last {WINDOW}")
    print(GAIN_HEADER)
    for seed in arguments.seeds:
        started = time.monotonic()
        curve = mean_curve(run(seed, arguments.nodes, arguments.rounds, config, Stories))
        gain, claim = print_gain(arguments.model.name, seed, curve, WINDOW, time.monotonic() - started)
        results.append(claim)
        if gain < WANTED_GAIN:
            short.append(seed)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if short:
        raise SystemExit(f"seeds {short}: gain under {WANTED_GAIN}")


if __name__ == "__main__":
    main()
