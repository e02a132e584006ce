"""One deploy at a time on a host."""

import os
import subprocess
from pathlib import Path

import pytest

from deploys import locks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(locks, "LOCK", tmp_path / "lock")
    return tmp_path / "lock"


def run(script: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, timeout=10, check=False
    )


def test_lock_is_taken_once_and_given_back(lock: Path) -> None:
    assert run(locks.take(None, is_broken=False)).returncode == 0
    assert lock.read_text().strip() == locks.owner()
    # Its owner may take it again.
    assert run(locks.take(None, is_broken=False)).returncode == 0
    run(locks.release())
    assert not lock.exists()


def test_lock_of_somebody_else_names_him_and_stays(lock: Path) -> None:
    lock.write_text("bob at desk/1, process 7, since 2026-01-01 10:00:00 UTC\n")
    refused = run(locks.held("echo done"))
    assert (refused.returncode, refused.stdout) == (75, "")
    said = "already: by bob at desk/1, process 7, since 2026-01-01 10:00:00 UTC; wait for its end"
    assert said in refused.stderr
    assert "--data break_lock=true" in refused.stderr
    run(locks.release())
    assert "bob" in lock.read_text()
    assert run(locks.take(None, is_broken=True)).returncode == 0
    assert lock.read_text().strip() == locks.owner()


def test_lock_is_given_back_after_an_operation_however_it_ends(lock: Path) -> None:
    for script, code in (
        ("echo done", 0),
        ("exit 3", 3),
        ("set -e; trap 'echo own' EXIT; false", 1),
    ):
        assert run(locks.held(script)).returncode == code
        assert not lock.exists()


def test_only_a_process_of_this_machine_that_has_ended_is_known_to_be_gone(lock: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait(10)
    assert not locks.is_abandoned(locks.owner())
    own = f"process {os.getpid()},"
    gone = locks.owner().replace(own, f"process {ended.pid},")
    assert locks.is_abandoned(gone)
    assert not locks.is_abandoned(gone.replace(" at ", " at elsewhere-"))
    assert not locks.is_abandoned("somebody")
    assert not locks.is_abandoned(gone.replace(f"process {ended.pid},", f"process {2**70},"))
    lock.write_text(gone + "\n")
    assert run(locks.take(None, is_broken=False)).returncode == 75
    assert run(locks.take(gone, is_broken=False)).returncode == 0


def test_process_of_another_user_is_not_gone_where_proc_hides_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With hidepid /proc has no entry for the process, and a signal is refused."""
    ended = subprocess.Popen(["true"])
    ended.wait(10)

    def refuse(pid: int, number: int) -> None:
        assert (pid, number) == (ended.pid, 0)
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not locks.is_abandoned(
        locks.owner().replace(f"process {os.getpid()},", f"process {ended.pid},")
    )
