"""Tasks of reasoning-gym: regenerated from their recipe on every machine, scored by the family's own scorer.

A task is a data set with one item. reasoning-gym's own index is not used: its item i of seed s is item i - 1 of seed
s + 1, so neighbouring seeds would share tasks.

Answers are strangers' text. Some scorers hand it to `eval`; see `_EVALUATING_MODULES` and `_EVALUATING_FAMILIES`.
"""

import ast
import contextlib
import difflib
import importlib
import importlib.metadata
import io
import json
import logging
import math
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from reasoning_gym.coaching.attributes import RangeAttributeDefinition
from reasoning_gym.coaching.base_curriculum import BaseCurriculum
from reasoning_gym.factory import CURRICULA, DATASETS, create_curriculum, create_dataset

from worker.environments import Config, Recipe
from worker.environments.mix import extract_answer
from worker.errors import SettingsError

log = logging.getLogger(__name__)

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

_NUM_QUICK_LEVELS = {"bf": 2, "jugs": 2, "n_queens": 4, "sokoban": 0, "zebra_puzzles": 4}
"""The levels after these many take seconds to make one task: too much for what a stranger may ask of us."""

_REFUSALS = (AssertionError, TypeError, ValueError)
"""What the `validate` and the constructors of reasoning-gym raise on a configuration."""

_making = threading.Lock()

_UNREADABLE_ANSWER = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError)
"""What reasoning-gym's scorers raise on an answer that they can't read (prime_factorization on "abc", say)."""


class ReasoningGym:
    """The families of reasoning-gym, except those whose scorer would evaluate a stranger's text. See `Source`."""

    version = f"reasoning-gym {importlib.metadata.version('reasoning-gym')}"

    def check(self, family: str, config: Config) -> None:
        if family not in DATASETS:
            close = difflib.get_close_matches(family, DATASETS, n=1)
            hint = f"did you mean {close[0]}?" if close else "reasoning-gym's gallery lists them"
            raise SettingsError(f"environment/families: {family}: not a family of {self.version}; {hint}")
        if family in _EVALUATING_FAMILIES:
            raise SettingsError(
                f"environment/families: {family}: its scorer evaluates the answer as Python, and answers come from "
                "strangers; take another family"
            )
        if family == "composite":
            raise SettingsError("environment/families: composite: name the families that it would mix, with weights")
        if reserved := {"seed", "size"} & config.keys():
            raise SettingsError(f"environment/families: {family}: {min(reserved)} follows from the task; leave it out")
        try:
            create_dataset(family, seed=0, size=1, **config)
        except _REFUSALS as error:
            raise SettingsError(
                f"environment/families: {family}: {json.dumps(dict(config))}: reasoning-gym refuses it: {error}"
            ) from None

    def levels(self, family: str, config: Config) -> list[Config]:
        """Up to the first level that reasoning-gym itself refuses, and without those that take seconds a task."""
        if family not in CURRICULA:
            return []
        curriculum = create_curriculum(family)
        num_levels = max((len(attribute.levels) for attribute in curriculum.attributes.values()), default=0)
        levels: list[Config] = []
        for level in range(min(num_levels, _NUM_QUICK_LEVELS.get(family, num_levels))):
            try:
                levels.append({**_level_config(curriculum, level), **config})
                made = DATASETS[family][1](**levels[-1])
                if hasattr(made, "validate"):  # two families' configurations have none
                    made.validate()
            except _REFUSALS:
                return levels[:level]
        return levels

    def question(self, recipe: Recipe) -> str:
        return str(_make_item(recipe)[1]["question"])

    def answer(self, recipe: Recipe) -> str | None:
        answer = _make_item(recipe)[1]["answer"]
        return None if answer is None else str(answer)

    def score(self, recipe: Recipe, completions: Sequence[str]) -> list[float]:
        """The family's own score of what stands in the last <answer>…</answer>; without one the reward is 0."""
        dataset, item = _make_item(recipe)
        return [_score(dataset, item, recipe.family, text) for text in completions]


def _level_config(curriculum: BaseCurriculum, level: int) -> dict[str, Any]:
    """What a level sets. The highest of an attribute stays for the levels above."""
    curriculum.set_global_level(level)
    made = curriculum.generate_configuration()
    names: list[str] = []
    for attribute in curriculum.attributes.values():
        if isinstance(attribute, RangeAttributeDefinition):
            names += [attribute.lower_field_name, attribute.upper_field_name]
        else:
            names.append(attribute.field_name)
    return {name: getattr(made, name) for name in names}


@lru_cache(maxsize=1024)  # a round asks for each task at least twice: its question, then its score
def _make_item(recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    # Family bf runs what it made, and that prints. The exchange's threads ask too, and there is one standard output.
    with _making, contextlib.redirect_stdout(io.StringIO()):
        dataset = create_dataset(recipe.family, seed=recipe.seed, size=1, **json.loads(recipe.config))
        return dataset, dataset[0]


def _max_answer_length(item: dict[str, Any]) -> int:
    """Longer answers are wrong. Scorers parse strangers' text in quadratic time: 140 s for 16,000 negation signs."""
    return len(item["question"]) if item["answer"] is None else 256 + 4 * len(str(item["answer"]))


def _score(dataset: Any, item: dict[str, Any], family: str, completion: str) -> float:
    answer = extract_answer(completion)
    if answer is None or len(answer) > _max_answer_length(item):
        return 0.0
    try:
        reward = float(dataset.score_answer(answer=answer, entry=item))
    except _UNREADABLE_ANSWER as error:
        log.debug("answer can't be read family=%s answer=%s error=%s", family, answer[:80], type(error).__name__)
        return 0.0
    if not math.isfinite(reward):
        log.warning("scorer gave no number family=%s answer=%s", family, answer[:80])
        return 0.0
    return min(1.0, max(0.0, reward))
