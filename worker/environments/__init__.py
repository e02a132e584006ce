"""Where tasks come from: an environment turns recipes into questions, answers into rewards. A new one is one file."""

from collections.abc import Sequence
from typing import Protocol

from worker import settings
from worker.records import Task


class Environment(Protocol):
    """What the node, the exchange and the benchmarks need of an environment."""

    def sample(self, seed: int, count: int) -> list[Task]:
        """The `count` tasks that belong to `seed`: the same on every machine with the same mix."""

    def question(self, task: Task) -> str:
        """The text of a task. Raises BadRecord ("unknown-task") for one that is not of this mix."""

    def score(self, task: Task, completions: Sequence[str]) -> list[float]:
        """The rewards, 0 to 1, of the completions. Raises BadRecord ("unknown-task") as `question` does."""


def load(environment: settings.Environment) -> Environment:
    """The environment that the settings name. Raises SettingsError for a family that there is not."""
    # Imported here: reasoning-gym costs a second, and not every role that imports the protocol needs it.
    from worker.environments.reasoning_gym import ReasoningGym

    return ReasoningGym(environment)
