"""Find the release that a process runs from: RELEASES/COMMIT, the target of the link `current`.

A deploy makes both (deploys/release.py); a service starts in the folder of its release. A rollback
writes its reason into a file next to them (deploys/rollback.py).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from worker.errors import WorkerError

_RELEASES, _CURRENT = "releases", "current"
ROLLED_BACK_FILE = "rolled-back.json"
_LENGTH = 12
"""Number of characters of a commit that are shown."""


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The last rollback of a host: which release it left, why, and when (Unix time)."""

    release: str
    reason: str
    at: float


def current(folder: Path) -> tuple[str, float | None] | None:
    """Return the release that contains the folder, and when it became the current one (Unix time).

    None: the folder is not in a release. The time is None if another release is current by now.
    """
    if folder.parent.name != _RELEASES:
        return None
    link = folder.parent.parent / _CURRENT
    try:
        is_current = link.resolve() == folder.resolve()
        deployed_at = link.lstat().st_mtime if is_current else None
    except OSError:
        deployed_at = None
    return folder.name[:_LENGTH], deployed_at


def last_rollback(folder: Path) -> RolledBack | None:
    """Return the last rollback of the host, whose release contains the folder. None: no rollback.

    Raises WorkerError if its file can't be read.
    """
    if folder.parent.name != _RELEASES:
        return None
    file = folder.parent.parent / ROLLED_BACK_FILE
    try:
        said = json.loads(file.read_text())
        return RolledBack(said["release"][:_LENGTH], str(said["reason"]), file.stat().st_mtime)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WorkerError(f"{file}: not the record of a rollback ({error}); remove it") from None
