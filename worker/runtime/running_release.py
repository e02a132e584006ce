"""The release that a process runs from: RELEASES/COMMIT, which the link `current` next to it names.

A deploy makes both (deploys/release.py); a service starts in the folder of its release.
"""

from pathlib import Path

_RELEASES, _CURRENT = "releases", "current"
_LENGTH = 12
"""Characters of a commit that are shown."""


def current(folder: Path) -> tuple[str, float | None] | None:
    """Return the release that contains the folder, and when it became the current one (Unix time).

    None: the folder is not of a release. The time is None if another release is current by now.
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
