"""Sources of tasks: an environment turns recipes into questions, answers into rewards. A new one is one file.

What the node sees is the mix of all families that its settings name (mixture.py). A new environment is a module that
offers `Source` (source.py), and a line in `_load_source`.
"""

from worker import settings
from worker.environments.source import Config, Environment, Recipe, Source
from worker.errors import SettingsError

__all__ = ["Config", "Environment", "Recipe", "Source", "load"]


def load(environment: settings.Environment) -> Environment:
    """The mix that the settings name. Raises SettingsError for a family that there is not."""
    from worker.environments.mixture import Mix

    names = {settings.split_family(family.name)[0] for family in environment.families}
    return Mix(environment, {name: _load_source(name) for name in sorted(names)})


def _load_source(name: str) -> Source:
    # Imported here: reasoning-gym costs a second, and not every role that imports the protocol needs it.
    if name == "reasoning-gym":
        from worker.environments.reasoning_gym import ReasoningGym

        return ReasoningGym()
    if name == "code":
        from worker.environments.code import Code

        return Code()
    raise SettingsError(
        f"environment/families: {name}/: no such environment; expected code/, or a family of reasoning-gym"
    )
