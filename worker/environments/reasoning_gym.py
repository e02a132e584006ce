"""Tasks of reasoning-gym, regenerated from their recipe and scored by the family's own scorer.

A task is a data set with one item. reasoning-gym's own index is not used: its item i of seed s is
item i - 1 of seed s + 1, so neighbouring seeds would share tasks.

Answers are untrusted text. `scripts/survey_families.py` measured how each family handles them, and
whether two processes make the same task from a recipe; `check` uses its results in `families.json`.
guards.py closes loopholes in scorers.
"""

import ast
import contextlib
import difflib
import importlib
import importlib.metadata
import io
import json
import logging
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from reasoning_gym.coaching.attributes import RangeAttributeDefinition
from reasoning_gym.coaching.base_curriculum import BaseCurriculum
from reasoning_gym.factory import CURRICULA, DATASETS, create_curriculum, create_dataset

from worker.environments import guards
from worker.environments.answers import extract_answer
from worker.environments.source import Config, Recipe
from worker.errors import BadRecord, SettingsError
from worker.records import derived_seed

log = logging.getLogger(__name__)

# These modules `eval` the answer before they compare it. A module-level name shadows the builtin,
# so that only literals are evaluated.
_EVALUATING_MODULES = (
    "reasoning_gym.algorithmic.binary_matrix",
    "reasoning_gym.algorithmic.spiral_matrix",
    "reasoning_gym.algorithmic.string_insertion",
    "reasoning_gym.games.n_queens",
)
# Python prints a warning for each suspicious place in a program: an answer could flood the log.
warnings.filterwarnings("ignore", category=SyntaxWarning)
for _name in _EVALUATING_MODULES:
    vars(importlib.import_module(_name))["eval"] = ast.literal_eval

FAMILIES_FILE = Path(__file__).with_name("families.json")
"""Verdicts on all families of the pinned version of reasoning-gym, by scripts/survey_families.py.
"""

MAX_DRAWS = 512
"""Largest number of items drawn for one task until one is sound.

A configuration with fewer than one sound item in 16 is refused.
"""
_CHECKED_ITEMS = 32

_REFUSALS = (AssertionError, TypeError, ValueError)
"""Errors that reasoning-gym's `validate` and constructors raise for an invalid configuration."""

_making = threading.Lock()

_UNREADABLE_ANSWER = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""Errors that reasoning-gym's scorers raise for answers that they can't parse."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The survey's result for a family.

    `verdict` is safe, guarded or refused, with its `reason`; `levels`: curriculum levels that are
    quick to make.
    """

    verdict: str
    reason: str
    levels: int


@cache
def verdicts() -> Mapping[str, Verdict]:
    """Return the verdict on each family.

    Raises SettingsError if the installed reasoning-gym is not the version that was surveyed.
    """
    survey = json.loads(FAMILIES_FILE.read_text())
    installed = importlib.metadata.version("reasoning-gym")
    if survey["version"] != installed:
        raise SettingsError(
            f"{FAMILIES_FILE}: written for reasoning-gym {survey['version']}, installed is"
            f" {installed}; install the pinned version, or run scripts/survey_families.py"
        )
    return {
        family: Verdict(row["verdict"], row["reason"], row["levels"])
        for family, row in survey["families"].items()
    }


class ReasoningGym:
    """The families of reasoning-gym, except those that the survey refuses. See `Source`."""

    version = f"reasoning-gym {importlib.metadata.version('reasoning-gym')}"

    def version_of(self, family: str) -> str:
        """Return the version, which includes the guard's.

        With another guard the same recipe is another task or earns another reward.
        """
        guard = guards.GUARDS.get(family)
        return self.version if guard is None else f"{self.version} guard {guard.revision}"

    def check(self, family: str, config: Config) -> None:
        if family not in DATASETS:
            close = difflib.get_close_matches(family, DATASETS, n=1)
            hint = f"did you mean {close[0]}?" if close else "reasoning-gym's gallery lists them"
            raise SettingsError(
                f"environment.families: {family}: not a family of {self.version}; {hint}"
            )
        found = verdicts()[family]
        if found.verdict == "refused":
            raise SettingsError(
                f"environment.families: {family}: refused: {found.reason}; take another family"
            )
        if reserved := {"seed", "size"} & config.keys():
            raise SettingsError(
                f"environment.families: {family}: {min(reserved)} follows from the task; leave"
                " it out"
            )
        try:
            create_dataset(family, seed=0, size=1, **config)
        except _REFUSALS as error:
            raise SettingsError(
                f"environment.families: {family}: {json.dumps(dict(config))}: reasoning-gym refuses"
                f" it: {error}"
            ) from None
        if not _has_sound_items(family, config):
            raise SettingsError(
                f"environment.families: {family}: {json.dumps(dict(config))}: no task of it is"
                f" sound: {guards.GUARDS[family].reason}; make it harder, or leave the"
                " configuration out"
            )

    def levels(
        self,
        family: str,
        config: Config,
    ) -> list[Config]:
        """Return the levels up to the first that reasoning-gym itself refuses.

        Levels that are slow to make or have no sound items are left out.
        """
        if family not in CURRICULA:
            return []
        curriculum = create_curriculum(family)
        num_levels = max(
            (len(attribute.levels) for attribute in curriculum.attributes.values()), default=0
        )
        levels: list[Config] = []
        for level in range(min(num_levels, verdicts()[family].levels)):
            try:
                at_level = {**_level_config(curriculum, level), **config}
                made = DATASETS[family][1](**at_level)
                if hasattr(made, "validate"):  # the configurations of two families lack it
                    made.validate()
            except _REFUSALS:
                return levels
            if _has_sound_items(family, at_level):
                levels.append(at_level)
        return levels

    def question(self, recipe: Recipe) -> str:
        return str(_make_item(recipe)[1]["question"])

    def answer(self, recipe: Recipe) -> str | None:
        answer = _make_item(recipe)[1]["answer"]
        return None if answer is None else str(answer)

    def score(
        self,
        recipe: Recipe,
        completions: Sequence[str],
    ) -> list[float]:
        """Return the family's own score of the text in the last <answer>…</answer>, else 0."""
        dataset, item = _make_item(recipe)
        return [_score(dataset, item, recipe.family, text) for text in completions]


SOURCE = ReasoningGym


def _level_config(
    curriculum: BaseCurriculum,
    level: int,
) -> dict[str, Any]:
    """Return the values that a level sets. Attributes with fewer levels keep their highest."""
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
    """Return the data set and the item of a recipe: the first draw that the guard accepts.

    Raises BadRecord ("unknown-task") if it accepts none of MAX_DRAWS.
    """
    guard = guards.GUARDS.get(recipe.family)
    config = json.loads(recipe.config)
    for draw in range(MAX_DRAWS):
        dataset, item = _draw(recipe.family, config, _draw_seed(recipe.seed, draw))
        if guard is None or guard.is_sound(item):
            return dataset, item
    raise BadRecord(
        "unknown-task",
        f"task of {recipe.family}, seed {recipe.seed}: none of {MAX_DRAWS} items is sound",
    )


def _draw(
    family: str,
    config: Config,
    seed: int,
) -> tuple[Any, dict[str, Any]]:
    # Family bf runs the program that it made, which prints. The exchange's threads call this too,
    # and they share one standard output.
    with _making, contextlib.redirect_stdout(io.StringIO()):
        dataset = create_dataset(family, seed=seed, size=1, **config)
        return dataset, dataset[0]


def _draw_seed(seed: int, draw: int) -> int:
    """Return the seed (31 bits) of a draw.

    The first draw has the recipe's own seed, the only one for families without a guard.
    """
    if draw == 0:
        return seed
    return derived_seed(f"{seed}/{draw}")


def _has_sound_items(family: str, config: Config) -> bool:
    """Return whether MAX_DRAWS draws are almost sure to include a sound item."""
    return (
        family not in guards.GUARDS
        or _count_sound(family, json.dumps(config)) >= _CHECKED_ITEMS // 16
    )


@cache
def _count_sound(family: str, config: str) -> int:
    drawn = (_draw(family, json.loads(config), seed)[1] for seed in range(_CHECKED_ITEMS))
    return sum(guards.GUARDS[family].is_sound(item) for item in drawn)


def _max_answer_length(item: dict[str, Any]) -> int:
    """Return the length, in characters, above which answers are wrong.

    Scorers parse untrusted text in quadratic time: 140 s for 16,000 negation signs.
    """
    if item["answer"] is None:
        return len(item["question"])
    return 256 + 4 * len(str(item["answer"]))


def _score(
    dataset: Any,
    item: dict[str, Any],
    family: str,
    completion: str,
) -> float:
    answer = extract_answer(completion)
    if answer is None or len(answer) > _max_answer_length(item):
        return 0.0
    if guards.is_refused_answer(answer):
        return 0.0
    guard = guards.GUARDS.get(family)

    def score() -> float:
        return guards.bounded(float(dataset.score_answer(answer=answer, entry=item)))

    try:
        return score() if guard is None else guard.score(item, answer, score)
    except _UNREADABLE_ANSWER as error:
        log.debug(
            "answer can't be read family=%s answer=%s error=%s",
            family,
            answer[:80],
            type(error).__name__,
        )
        return 0.0
