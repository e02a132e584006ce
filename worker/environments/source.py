"""The interfaces of task sources and of their mixture, and the recipe of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from worker.records import ScoredGroup, Task

Config = Mapping[str, Any]
"""A family's configuration: plain JSON values."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The recipe of one task within a source.

    `family` is a name without the environment, `config` a configuration as JSON text; `seed` has 31
    bits.
    """

    family: str
    config: str
    seed: int


class Source(Protocol):
    """An environment: families of tasks that it makes from recipes and scores.

    It is called from several threads.
    """

    version: str
    """Name and version, such as "reasoning-gym 0.1.25"; it determines the task of a recipe."""

    def version_of(self, family: str) -> str:
        """Return the version that determines tasks and rewards of a family."""

    def check(self, family: str, config: Config) -> None:
        """Raise SettingsError for an unknown family or an invalid configuration."""

    def levels(
        self,
        family: str,
        config: Config,
    ) -> Sequence[Config]:
        """Return the configurations of the family's curriculum, the easiest first.

        `config` overrides each; empty: the family has no curriculum.
        """

    def question(self, recipe: Recipe) -> str:
        """Return the text of a task."""

    def answer(self, recipe: Recipe) -> str | None:
        """Return one right answer as it is between the tags; None: the source has none."""

    def score(
        self,
        recipe: Recipe,
        completions: Sequence[str],
    ) -> list[float]:
        """Return the rewards, 0 to 1, of the completions, in bounded time.

        Completions are text of untrusted peers.
        """


class Environment(Protocol):
    """The interface for the node, the exchange and the benchmarks; implemented by `mixture.Mix`."""

    @property
    def versions(self) -> tuple[str, ...]:
        """Return names and versions of the sources in the mix."""

    @property
    def families(self) -> tuple[str, ...]:
        """Return each family of the mix with its configuration.

        Two peers share the families for which both return the same text.
        """

    @property
    def names(self) -> tuple[str, ...]:
        """Return the families of the mix, each once."""

    @property
    def levels(self) -> dict[str, int]:
        """Return the curriculum level of each family that has one in the settings."""

    def sample(
        self,
        seed: int,
        count: int,
        part: int = 0,
    ) -> list[Task]:
        """Return the `count` tasks of `seed` in a part of a round (records.Place).

        They are the same on every machine with the same mix at the same levels.
        """

    def tasks_of(
        self,
        family: str,
        level: int | None,
        seed: int,
        count: int,
    ) -> list[Task]:
        """Return tasks of one family at a level, or without one.

        Raises SettingsError if there is no such family or level.
        """

    def easy_tasks(
        self,
        seed: int,
        count: int,
    ) -> list[Task]:
        """Return tasks of all families in turn, each at its easiest level."""

    def question(self, task: Task) -> str:
        """Return the text of a task.

        Raises BadRecord ("unknown-task") for one that is not in this mix.
        """

    def answer(self, task: Task) -> str | None:
        """Return one right answer; None if the family has none."""

    def level_of(self, task: Task) -> int | None:
        """Return the level of a task in its family's curriculum; None without one."""

    def score(
        self,
        task: Task,
        completions: Sequence[str],
    ) -> list[float]:
        """Return the rewards, 0 to 1, of the completions. Raises BadRecord ("unknown-task")."""

    def learn(self, groups: Sequence[ScoredGroup]) -> None:
        """Update the levels with our own groups of a round."""

    def state(self) -> dict[str, Any]:
        """Return the state of the curriculum, as plain JSON values."""

    def resume(
        self,
        state: dict[str, Any],
    ) -> None:
        """Continue from the result of `state`. Raises TrainingError for anything else."""
