"""Deploys wait for other package managers, finish an interrupted dpkg, and report other errors."""

import os
import subprocess
from pathlib import Path

from deploys.hardware import CloudInitErrors
from deploys.system import APT_UPDATE

LOCKED = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)"


def run(folder: Path, apt: str, **others: str) -> "subprocess.CompletedProcess[str]":
    """Run the command with stand-ins for apt-get, dpkg, sleep and `others`."""
    for name, text in {"apt-get": apt, "sleep": "", "dpkg": "", **others}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-c", APT_UPDATE],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={"PATH": path},
    )


def test_lock_is_waited_for_and_its_holder_named(tmp_path: Path) -> None:
    count = tmp_path / "count"
    done = run(
        tmp_path,
        f'echo x >> {count}; [ $(wc -l < {count}) -gt 3 ] || {{ echo "{LOCKED}" >&2; exit 100; }}',
    )
    assert (done.returncode, done.stderr.strip()) == (0, LOCKED)
    assert len(count.read_text().splitlines()) == 4


def test_lock_that_stays_and_other_failures_end_it(tmp_path: Path) -> None:
    stays = run(tmp_path, f'echo "{LOCKED}" >&2; exit 100')
    assert stays.returncode == 1
    assert stays.stderr.endswith("the lock is still taken after 300 s\n")
    other = run(tmp_path, "echo E: no route >&2; exit 100")
    assert (other.returncode, other.stderr) == (1, "E: no route\n")


# Of what a dpkg that was killed leaves behind. It finishes in the second try: the first one finds
# the lock taken.
INTERRUPTED = """case $* in
--audit) cat {0}/unfinished 2>/dev/null || true;;
*--configure*-a) echo x >> {0}/tries; [ $(wc -l < {0}/tries) -gt 1 ] || {{
  echo 'dpkg: error: dpkg frontend lock was locked by another process with pid 7' >&2; exit 2; }}
  rm {0}/unfinished;;
esac"""


def test_interrupted_dpkg_is_finished_before_apt(tmp_path: Path) -> None:
    (tmp_path / "unfinished").write_text("The following packages are only half configured: x\n")
    done = run(tmp_path, f"[ ! -e {tmp_path}/unfinished ]", dpkg=INTERRUPTED.format(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "tries").read_text() == "x\nx\n"


def test_dpkg_that_can_not_be_finished_is_named(tmp_path: Path) -> None:
    dpkg = (
        "[ $1 = --audit ] || echo 'dpkg: error processing package x' >&2; echo half-configured;"
        " exit 1"
    )
    done = run(tmp_path, "", dpkg=dpkg)
    assert done.returncode == 1
    assert "error processing package x" in done.stderr
    assert "dpkg was interrupted before this deploy" in done.stderr


def test_first_boot_that_does_not_end_is_named_and_one_that_failed_is_no_hindrance(
    tmp_path: Path,
) -> None:
    late = run(tmp_path, "", timeout="exit 124", **{"cloud-init": ""})
    assert late.returncode == 1
    assert "cloud-init is still at work after 600 s" in late.stderr
    assert run(tmp_path, "", timeout="exit 1", **{"cloud-init": ""}).returncode == 0


def test_errors_of_the_first_boot_are_read() -> None:
    failed = [
        '{"v1": {"datasource": "DataSourceEc2",',
        '"errors": ["(\'runcmd\', ProcessExecutionError(1))"]}}',
    ]
    assert CloudInitErrors().process(failed) == "('runcmd', ProcessExecutionError(1))"
    assert CloudInitErrors().process(['{"v1": {"datasource": "x", "errors": []}}']) is None
    assert CloudInitErrors.default() is None
