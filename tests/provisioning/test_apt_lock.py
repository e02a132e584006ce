"""Package lists that somebody else is fetching are waited for; any other failure ends at once."""

import os
import subprocess
from pathlib import Path

from deploys.system import APT_UPDATE

LOCKED = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)"


def run(folder: Path, apt: str) -> "subprocess.CompletedProcess[str]":
    """Run the command with stand-ins for apt-get and sleep."""
    for name, text in (("apt-get", apt), ("sleep", "")):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-c", APT_UPDATE], capture_output=True, text=True, timeout=30, check=False, env={"PATH": path}
    )


def test_lock_is_waited_for_and_its_holder_named(tmp_path: Path) -> None:
    count = tmp_path / "count"
    done = run(tmp_path, f'echo x >> {count}; [ $(wc -l < {count}) -gt 3 ] || {{ echo "{LOCKED}" >&2; exit 100; }}')
    assert (done.returncode, done.stderr.strip()) == (0, LOCKED)
    assert len(count.read_text().splitlines()) == 4


def test_lock_that_stays_and_other_failures_end_it(tmp_path: Path) -> None:
    stays = run(tmp_path, f'echo "{LOCKED}" >&2; exit 100')
    assert stays.returncode == 1
    assert stays.stderr.endswith("the lock is still taken after 300 s\n")
    other = run(tmp_path, "echo E: no route >&2; exit 100")
    assert (other.returncode, other.stderr) == (1, "E: no route\n")
