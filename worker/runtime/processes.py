"""Exit orderly on a signal, and end child processes with their parent."""

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1
# Loaded before any fork: a child that loads it may hang.
_libc = ctypes.CDLL(None, use_errno=True)


def exit_on_signals() -> None:
    """Make SIGTERM and SIGINT end the process with code 0, running every `finally` block."""

    def leave(signum: int, frame: FrameType | None) -> None:
        # A second signal must not break the orderly end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)


def is_running(pid: int | str) -> bool:
    """Return whether a process with this id exists on this machine."""
    return Path(f"/proc/{pid}").exists()


def die_with_parent(
    parent: int,
    signum: signal.Signals = signal.SIGKILL,
) -> bool:
    """Let the kernel send `signum` to this process when its parent ends, however that ends.

    Return False if the process `parent` has ended already, which the kernel does not report. Two
    programs have their own version because they can't import this module: the launcher of p2pd
    (swarm/transport/daemon.py) and the sandbox's child (environments/sandbox_child.py).
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signum)
    return os.getppid() == parent
