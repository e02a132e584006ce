"""One deploy at a time: a lock file on the host with its owner, the machine and the start time.

It is in /run, so a reboot releases it. A deploy takes it before its first command that may change
the host (deploys/pyinfra_ext/fact_cache.py); a run that changes nothing does not take it. An
operation of `hivewright fleet` holds it while its script runs. A lock of a process of this machine
that has ended is broken automatically; for any other stale lock there is a flag.
"""

import getpass
import os
import re
import shlex
import socket
import time
from functools import cache
from pathlib import Path

from pyinfra import host
from pyinfra.context import ctx_host, ctx_inventory

from deploys.facts import OwnFact
from deploys.paths import LOCK

# Host data, set on the command line: `--data break_lock=true`.
BREAK = "break_lock"
LOCKED = "this host is being changed already"
_OWNER = re.compile(r".* at (?P<machine>\S+), process (?P<pid>\d+), since .*")


class HostLock(OwnFact[str | None]):
    """The owner of the host's lock; None: it is free."""

    def command(self) -> str:
        return f"cat {LOCK} 2>/dev/null; true"

    def read(
        self,
        output: list[str],
    ) -> str | None:
        return output[0].strip() or None


@cache
def owner() -> str:
    """Return the owner of every lock that this process takes, as one readable line."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return f"{user} at {_machine()}, process {os.getpid()}, since {since}"


def is_abandoned(held_by: str) -> bool:
    """Return whether the owner was a process of this machine that has ended."""
    found = _OWNER.fullmatch(held_by)
    if found is None or found["machine"] != _machine():
        return False
    try:
        # Not looked up in /proc, which hides processes of other users if mounted with hidepid.
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


def take(abandoned: str | None, is_broken: bool) -> str:
    """Return shell commands that take the lock, or fail and name its owner.

    `abandoned`: an owner whose lock may be broken. `is_broken`: break any lock.
    """
    if is_broken:
        remove = f"rm -f {LOCK}; "
    elif abandoned:
        remove = f'[ "$(cat {LOCK} 2>/dev/null)" != {shlex.quote(abandoned)} ] || rm -f {LOCK}; '
    else:
        remove = ""
    own = shlex.quote(owner())
    return (
        f"{remove}( set -C; echo {own} > {LOCK} ) 2>/dev/null || {{ held=$(cat {LOCK} 2>/dev/null);"
        f' [ "$held" = {own} ] || {{ echo "{LOCKED}: by ${{held:-nobody ({LOCK} can not be'
        " written)};"
        f" wait for its end; if it no longer runs, use --data {BREAK}=true (hivewright:"
        ' --break-lock)" >&2;'
        " exit 75; }; }"
    )


def release() -> str:
    """Return shell commands that release the lock if this process holds it."""
    return f'[ "$(cat {LOCK} 2>/dev/null)" != {shlex.quote(owner())} ] || rm -f {LOCK}'


def held(script: str) -> str:
    """Return the script of a stand-alone operation with the lock held around it."""
    found, is_broken = None, False
    # Without a host (as in tests) only the script is of interest.
    if ctx_inventory.isset() and ctx_host.isset():
        found, is_broken = host.get_fact(HostLock), host.data.get(BREAK) is True
    abandoned = found if found and is_abandoned(found) else None
    return f"{take(abandoned, is_broken)}; trap {shlex.quote(release())} EXIT; ( {script}\n)"


@cache
def _machine() -> str:
    """Return the name of this machine and of its current boot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    mark = boot.read_text()[:8] if boot.exists() else "unknown"
    return f"{socket.gethostname()}/{mark}"
