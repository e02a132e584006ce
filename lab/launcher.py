"""`python -m lab.launcher`: run one lab host in its own cgroups until it is switched off.

A host that reboots is started again. On SIGTERM, or with --while-stdin-open when its starter has
ended, the host is switched off as by a power cut, since nothing on a lab host should outlive it.
"""

import argparse
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab import process

REBOOT = 133  # exit code of systemd-nspawn --keep-unit when the host asked for a reboot


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="where pid files are written")
    parser.add_argument(
        "--cgroup", type=Path, action="append", default=[], help="cgroup to live in"
    )
    parser.add_argument(
        "--while-stdin-open", action="store_true", help="shut down when standard input closes"
    )
    parser.add_argument("nspawn", nargs="+", help="the systemd-nspawn command")
    options = parser.parse_args()

    for cgroup in options.cgroup:  # with --keep-unit all hosts would otherwise share one
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    environment = {
        **os.environ,
        "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
        "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
    }
    code = REBOOT
    while code == REBOOT and not stopping:
        nspawn = subprocess.Popen(
            options.nspawn, env=environment, start_new_session=True, stdin=subprocess.DEVNULL
        )
        process.remember(nspawn.pid, options.folder / "nspawn.pid")
        while nspawn.poll() is None and not stopping:
            if options.while_stdin_open and is_closed(sys.stdin.fileno()):
                break
            time.sleep(0.2)
        if nspawn.poll() is None:
            stopping.append(0)
            switch_off(nspawn.pid)
        code = nspawn.wait()


def leader(nspawn_pid: int) -> int | None:
    """Return the pid of the host's init on this machine; None: it does not run."""
    children = Path(f"/proc/{nspawn_pid}/task/{nspawn_pid}/children")
    try:
        pids = children.read_text().split()
    except FileNotFoundError:
        return None
    return int(pids[0]) if pids else None


def switch_off(nspawn_pid: int) -> None:
    """Switch off like a power cut; killing only systemd-nspawn would leave processes behind."""
    first = leader(nspawn_pid)
    if first is not None:
        os.kill(first, signal.SIGKILL)
    os.kill(nspawn_pid, signal.SIGKILL)


def is_closed(pipe: int) -> bool:
    """Return whether the other end of a pipe is closed; nothing is ever written to it."""
    readable, _, _ = select.select([pipe], [], [], 0)
    return bool(readable)


if __name__ == "__main__":
    main()
