"""Show the dashboard the answers of the workers on its host, for its owner.

A worker's folder has keys, so only `answers` in it is shown. That name is the worker's to replace,
by a link to another service's folder, say, and systemd follows links in BindReadOnlyPaths=. So root
first mounts the folder itself, which it has entered and compared, at a place of its own.
"""

import shlex
from collections.abc import Collection
from pathlib import Path

from deploys.paths import STATE, USER
from worker.runtime.state_dir import StateDir

# Of a unit's commands, also those of root see only what the service sees.
_OUTSIDE = "/usr/bin/nsenter --mount=/proc/1/ns/mnt"
PLACES = Path("/run/hivewright-answers")
"""Root's folder, which nobody else may enter, with a mount for each worker."""


def drop_in_text(node_dirs: Collection[Path]) -> str:
    """Return the drop-in that shows the answers of these nodes to the dashboard; "" without any.

    Folders outside of STATE are not hidden from it.
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

    They succeed without it, too: the dashboard then says that it sees none.
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
