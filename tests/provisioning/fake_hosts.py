"""pyinfra's command line on hosts of its @fake connector."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from tests import preloaded

PYINFRA = "pyinfra.__main__"
"""The module that tests/preloaded.py imports before it forks a pyinfra."""
CHECKOUT = Path(__file__).parents[2]
PYINFRA_KEYS = ("ssh_hostname", "ssh_user", "_sudo", "_timeout")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What pyinfra's own operations insist on.
FAKE_ANSWERS = {
    "uname -s": "Linux",
    "command -v useradd": "/usr/sbin/useradd",
    "VERSION_CODENAME": "debian,bookworm,x86_64",
}


def pyinfra(
    *arguments: str | Path,
    timeout: float = 60,
    env: Mapping[str, str] = os.environ,
    stderr: int | IO[str] = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyinfra", *map(str, arguments)]
    return preloaded.run(command, PYINFRA, cwd=CHECKOUT, env=env, timeout=timeout, stderr=stderr)


def assert_refused(done: subprocess.CompletedProcess[str], *lines: str) -> None:
    """Assert exit code 2 with these last lines, before pyinfra loaded any hosts."""
    assert done.returncode == 2, done.stderr
    assert tuple(done.stderr.splitlines()) == ("--> Loading config...", *lines)
