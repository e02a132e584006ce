"""The run that trackers show: one node's life."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Run:
    """A node as trackers name it.

    `id`: stays the same over restarts. `folder`: where trackers may write (`STATE/logs`).
    `settings`: shown with the run; without secrets, which settings never contain.
    """

    id: str
    name: str
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
