"""Control groups: one for each host below one for the lab, since hosts cannot share one."""

import errno
import os
from pathlib import Path

from lab.process import wait_until

# Limit of the wait for the end of a host's processes after it was switched off.
GONE_SECONDS = 15


def folders(*names: str) -> list[Path]:
    """Return the group NAME/NAME... in each hierarchy that a host's systemd uses.

    These are cgroup 2, and systemd's own next to it.
    """
    tops = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options = line.split()[:4]
        if where.startswith("/sys/fs/cgroup") and (kind == "cgroup2" or "name=systemd" in options):
            tops.append(Path(where))
    return [top.joinpath(*names) for top in tops]


def remove(group: Path) -> None:
    """Remove a group and its subgroups, as soon as the last process in them has ended."""
    wait_until(lambda: _is_removed(group), GONE_SECONDS, f"{group} is without processes")


def _is_removed(group: Path) -> bool:
    try:
        for folder, _, _ in os.walk(group, topdown=False):
            Path(folder).rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True
