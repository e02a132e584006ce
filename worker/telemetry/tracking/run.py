"""The run that trackers show: a node over all its restarts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Run:
    """A node's identification for trackers.

    `id`: the same after every restart. `folder`: where trackers may write (`STATE/logs`).
    `settings`: shown with the run; settings never contain secrets.
    """

    id: str
    name: str
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
