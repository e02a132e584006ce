"""Let the dashboard read the answers of the workers on its host, for its owner.

A worker's folder contains keys, so only its subfolder `answers` is shared. A worker could replace
it by a link to another service's folder, and systemd follows links in BindReadOnlyPaths=. So root
first enters the folder, compares its path, and mounts it at a place that only root controls.
"""

import shlex
from collections.abc import Collection
from pathlib import Path

from deploys.paths import STATE, USER
from worker.runtime.state_dir import StateDir

# Even root's commands of a unit see only the files that the service sees.
_OUTSIDE = "/usr/bin/nsenter --mount=/proc/1/ns/mnt"
PLACES = Path("/run/hivewright-answers")
"""Root's folder, closed to others, with a mount for each worker."""


def drop_in_text(node_dirs: Collection[Path]) -> str:
    """Return the drop-in with which the dashboard sees the answers of these nodes; "" if none.

    Folders outside STATE are visible to it anyway.
    """
    hidden = [folder for folder in node_dirs if folder.parent == STATE]
    lines = []
    for folder in hidden:
        place = PLACES / folder.name
        lines += [
            f"ExecStartPre=+{_OUTSIDE} /bin/sh -c {_in_unit(show_script(folder, place))}",
            f"BindReadOnlyPaths=-{place}:{StateDir(folder).answers}",
            f"ExecStopPost=+-{_OUTSIDE} /bin/umount --lazy {place}",
        ]
    return "\n".join(["[Service]", *lines, ""]) if lines else ""


def show_script(folder: Path, place: Path) -> str:
    """Return shell commands that mount a node's folder of answers at `place`.

    They succeed even if it can't be mounted; the dashboard then shows that there are none.
    """
    answers = StateDir(folder).answers
    return (
        f"install -d -m 700 -o {USER} -g {USER} {folder}"
        f" && install -d -m 700 {place.parent} {place}"
        f" && runuser -u {USER} -- mkdir -p -m 700 {answers} && cd {answers}"
        f' && if [ "$(pwd -P)" = {answers} ]; then umount --lazy {place} 2>/dev/null;'
        f" mount --bind . {place};"
        f" else echo {answers} is a link, not shown to the dashboard >&2; fi || true"
    )


def _in_unit(script: str) -> str:
    return shlex.quote(script.replace("%", "%%").replace("$", "$$"))
