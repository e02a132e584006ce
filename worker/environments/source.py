"""The interfaces of task sources and of their mixture, and the recipe of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from worker.records import ScoredGroup, Task

Config = Mapping[str, Any]
"""A family's configuration: plain JSON values."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One task, as a source makes it: a family of its own, a configuration as JSON text, and a seed
    (31 bits)."""

    family: str
    config: str
    seed: int


class Source(Protocol):
    """An environment: families of tasks that it makes from recipes and scores. Called from several
    threads."""

    version: str
    """Name and version, such as "reasoning-gym 0.1.25". Nodes with different ones make different
    tasks of a recipe."""

    def version_of(self, family: str) -> str:
        """The version that a recipe of this family depends on: same version, same task and same
        rewards."""

    def check(self, family: str, config: Config) -> None:
        """Raises SettingsError for a family that there is not, and for a configuration that it
        refuses."""

    def levels(self, family: str, config: Config) -> Sequence[Config]:
        """The configurations of the family's curriculum, the easiest first, `config` on top; none:
        no curriculum."""

    def question(self, recipe: Recipe) -> str:
        """The text of a task."""

    def answer(self, recipe: Recipe) -> str | None:
        """One right answer as it stands between the tags; None: the source names none."""

    def score(self, recipe: Recipe, completions: Sequence[str]) -> list[float]:
        """The rewards, 0 to 1, of the completions, which are untrusted peers' text. In bounded
        time."""


class Environment(Protocol):
    """What the node, the exchange and the benchmarks need: `mixture.Mix` is one."""

    @property
    def versions(self) -> tuple[str, ...]:
        """Names and versions of the sources that are in it."""

    @property
    def families(self) -> tuple[str, ...]:
        """Each family of the mix with its configuration's digest: peers have those in common that
        they name alike."""

    @property
    def names(self) -> tuple[str, ...]:
        """The families of the mix, each once."""

    @property
    def levels(self) -> dict[str, int]:
        """The curriculum level of each family that has one in the settings."""

    def sample(self, seed: int, count: int) -> list[Task]:
        """The `count` tasks that belong to `seed`: the same on every machine with the same mix at
        the same levels."""

    def tasks_of(self, family: str, level: int | None, seed: int, count: int) -> list[Task]:
        """Tasks of one family at a level, or without one. Raises SettingsError if there is no such
        family or level."""

    def easy_tasks(self, seed: int, count: int) -> list[Task]:
        """Tasks of all families in turn, each at its easiest level."""

    def question(self, task: Task) -> str:
        """The text of a task. Raises BadRecord ("unknown-task") for one that is not of this mix."""

    def answer(self, task: Task) -> str | None:
        """One right answer; None for a family that names none."""

    def level_of(self, task: Task) -> int | None:
        """Level of a task in its family's curriculum; None without one."""

    def score(self, task: Task, completions: Sequence[str]) -> list[float]:
        """The rewards, 0 to 1, of the completions. Raises BadRecord ("unknown-task") as `question`
        does."""

    def learn(self, groups: Sequence[ScoredGroup]) -> None:
        """See how our own groups of a round went: levels may rise and fall."""

    def state(self) -> dict[str, Any]:
        """Return where the curriculum stands, as plain JSON values."""

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave. Raises TrainingError for anything else."""
