"""Task sources: an environment turns recipes into questions and answers into rewards.

An environment is one file: a module here whose `SOURCE` makes a `Source` (source.py). The node uses
the mix of all families that its settings name (mixture.py). The name of a family begins with its
environment: `code/lists` is in `code.py`, `a-b/c` in `a_b.py`; a name without a slash is a family
of reasoning-gym.
"""

import importlib
import pkgutil

from worker import settings
from worker.environments.source import Config, Environment, Recipe, Source
from worker.errors import SettingsError

__all__ = ["Config", "Environment", "Recipe", "Source", "load"]


def load(environment: settings.Environment) -> Environment:
    """Return the mix that the settings name. Raises SettingsError for an unknown family."""
    from worker.environments.mixture import Mix

    names = {settings.split_family(family.name)[0] for family in environment.families}
    return Mix(environment, {name: _load_source(name) for name in sorted(names)})


def _load_source(name: str) -> Source:
    """Import only this environment: reasoning-gym takes a second, and not every role needs it."""
    module = name.replace("-", "_")
    if module in _modules():
        make = getattr(importlib.import_module(f"{__name__}.{module}"), "SOURCE", None)
        if make is not None:
            source: Source = make()
            return source
    raise SettingsError(
        f"environment.families: {name}/: no such environment; expected {_names()}, or a family of"
        " reasoning-gym"
    )


def _modules() -> list[str]:
    return [found.name for found in pkgutil.iter_modules(__path__)]


def _names() -> str:
    """Names of the environments, as prefixes of families."""
    names = []
    for name in _modules():
        is_environment = hasattr(importlib.import_module(f"{__name__}.{name}"), "SOURCE")
        if is_environment and name != "reasoning_gym":
            names.append(f"{name.replace('_', '-')}/")
    return ", ".join(names)
