"""Tasks of reasoning-gym: regenerated from their recipe on every machine, scored by the family's own scorer.

A task's recipe (family, config digest, seed, index) becomes the seed of a data set with one item. reasoning-gym's own
index is not used: its item i of seed s is item i - 1 of seed s + 1, so neighbouring seeds would share tasks.

Answers are strangers' text. Some scorers hand it to `eval`; see `_EVALUATING_MODULES` and `_EVALUATING_FAMILIES`.
"""

import ast
import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import io
import json
import logging
import math
import random
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from reasoning_gym.factory import DATASETS, create_dataset

from worker import settings
from worker.errors import BadRecord, SettingsError
from worker.records import Task

log = logging.getLogger(__name__)

VERSION = importlib.metadata.version("reasoning-gym")
MAX_INDEX = 1 << 16
"""Tasks of one seed. Far above any round; keeps strangers' recipes in a known range."""

# These modules `eval` the answer before they compare it. A module-level name shadows the builtin: literals only.
_EVALUATING_MODULES = (
    "reasoning_gym.algorithmic.binary_matrix",
    "reasoning_gym.algorithmic.spiral_matrix",
    "reasoning_gym.algorithmic.string_insertion",
    "reasoning_gym.games.n_queens",
)
for _name in _EVALUATING_MODULES:
    vars(importlib.import_module(_name))["eval"] = ast.literal_eval

_EVALUATING_FAMILIES = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Their scorers run the answer through sympy's parser, which evaluates Python: refused."""

_making = threading.Lock()

_UNREADABLE_ANSWER = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError)
"""What reasoning-gym's scorers raise on an answer that they can't read (prime_factorization on "abc", say)."""


class ReasoningGym:
    """A weighted mix of reasoning-gym families.

    Raises SettingsError for an unknown family, a configuration that the family refuses, and families whose scorer
    would evaluate a stranger's text.
    """

    def __init__(self, environment: settings.Environment) -> None:
        self._families = {(f.name, _check(f)): f for f in environment.families}
        if len(self._families) < len(environment.families):
            raise SettingsError(
                "environment/families: a family stands there twice with one configuration; give it once"
            )

    def sample(self, seed: int, count: int) -> list[Task]:
        """The first `count` tasks of `seed`; the family of each is drawn by weight."""
        if not 0 <= count <= MAX_INDEX:
            raise SettingsError(f"tasks_per_round: got {count}; expected at most {MAX_INDEX}")
        drawn = random.Random(f"families/{seed}").choices(
            list(self._families), weights=[f.weight for f in self._families.values()], k=count
        )
        return [Task(name, digest, seed, index) for index, (name, digest) in enumerate(drawn)]

    def question(self, task: Task) -> str:
        return str(self._item(task)[1]["question"])

    def answer(self, task: Task) -> str | None:
        """reasoning-gym's own answer; None for a family that has many right ones and names none."""
        answer = self._item(task)[1]["answer"]
        return None if answer is None else str(answer)

    def score(self, task: Task, completions: Sequence[str]) -> list[float]:
        """The family's own score of what stands in the last <answer>…</answer>; without one the reward is 0."""
        dataset, item = self._item(task)
        return [_score(dataset, item, task, text) for text in completions]

    def _item(self, task: Task) -> tuple[Any, dict[str, Any]]:
        family = self._families.get((task.family, task.config_digest))
        if family is None:
            raise BadRecord("unknown-task", f"task {task.family}/{task.config_digest}: not in this node's mix")
        if not 0 <= task.index < MAX_INDEX:
            raise BadRecord("unknown-task", f"task {task.family}: index {task.index} is not in 0..{MAX_INDEX - 1}")
        return _make_item(family.name, json.dumps(family.config), task.seed, task.index)


def config_digest(family: settings.Family) -> str:
    """12 hex digits that two nodes share if, and only if, a recipe of `family` makes the same task for both."""
    canonical = json.dumps([VERSION, family.name, family.config], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def extract_answer(completion: str) -> str | None:
    """The text of the last <answer>…</answer>, stripped; None if there is none."""
    head, closing, _ = completion.rpartition("</answer>")
    _, opening, answer = head.rpartition("<answer>")
    return answer.strip() if closing and opening else None


def _check(family: settings.Family) -> str:
    if family.name not in DATASETS:
        close = difflib.get_close_matches(family.name, DATASETS, n=1)
        hint = f"did you mean {close[0]}?" if close else "reasoning-gym's gallery lists them"
        raise SettingsError(f"environment/families: {family.name}: not a reasoning-gym {VERSION} family; {hint}")
    if family.name in _EVALUATING_FAMILIES:
        raise SettingsError(
            f"environment/families: {family.name}: its scorer evaluates the answer as Python, and answers come from "
            "strangers; take another family"
        )
    if reserved := {"seed", "size"} & family.config.keys():
        raise SettingsError(f"environment/families: {family.name}: {min(reserved)} follows from the task; leave it out")
    try:
        create_dataset(family.name, seed=0, size=1, **family.config)
    except (AssertionError, TypeError, ValueError) as error:  # what its `validate` and constructors raise
        raise SettingsError(
            f"environment/families: {family.name}: {json.dumps(family.config)}: reasoning-gym refuses it: {error}"
        ) from None
    return config_digest(family)


@lru_cache(maxsize=1024)  # a round asks for each task at least twice: its question, then its score
def _make_item(name: str, config: str, seed: int, index: int) -> tuple[Any, dict[str, Any]]:
    item_seed = int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4], "big") >> 1
    # Family bf runs what it made, and that prints. The exchange's threads ask too, and there is one standard output.
    with _making, contextlib.redirect_stdout(io.StringIO()):
        dataset = create_dataset(name, seed=item_seed, size=1, **json.loads(config))
        return dataset, dataset[0]


def _max_answer_length(item: dict[str, Any]) -> int:
    """Longer answers are wrong. Scorers parse strangers' text in quadratic time: 140 s for 16,000 negation signs."""
    return len(item["question"]) if item["answer"] is None else 256 + 4 * len(str(item["answer"]))


def _score(dataset: Any, item: dict[str, Any], task: Task, completion: str) -> float:
    answer = extract_answer(completion)
    if answer is None or len(answer) > _max_answer_length(item):
        return 0.0
    try:
        reward = float(dataset.score_answer(answer=answer, entry=item))
    except _UNREADABLE_ANSWER as error:
        log.debug("answer can't be read family=%s answer=%s error=%s", task.family, answer[:80], type(error).__name__)
        return 0.0
    if not math.isfinite(reward):
        log.warning("scorer gave no number family=%s answer=%s", task.family, answer[:80])
        return 0.0
    return min(1.0, max(0.0, reward))
