"""The note that a rollback leaves on the host, written by its own shell commands."""

import os
import subprocess
from pathlib import Path

import pytest

from deploys import paths, rollback
from worker.runtime import running_release
from worker.runtime.running_release import RolledBack

REASON = """gpu-1: worker@0: "mean" $(touch x) `x` \\ 'y'\n%s of 0.1, http://me:hunter2@h/"""
SHOWN = """gpu-1: worker@0: "mean" $(touch x) `x` \\ 'y'\\n%s of 0.1, http://[redacted]@h/"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder like /opt/hivewright, with two releases and the copy to go back to."""
    for name in ("a" * 40, "b" * 40):
        (tmp_path / "releases" / name).mkdir(parents=True)
    (tmp_path / "previous").mkdir()
    os.utime(tmp_path / "previous", (100, 100))
    (tmp_path / "current").symlink_to(tmp_path / "releases" / ("b" * 40))
    return tmp_path


def note(root: Path, reason: str) -> RolledBack | None:
    script = f"set -e; old={root}/previous\n{rollback.record_script(reason)}"
    script = script.replace(str(paths.ROOT), str(root))
    subprocess.run(["sh", "-c", script], check=True, timeout=20, umask=0o077)
    return running_release.last_rollback(root / "releases" / ("a" * 40))


def test_reason_arrives_as_it_was_without_control_characters_and_passwords(root: Path) -> None:
    found = note(root, REASON)
    assert found is not None
    assert (found.release, found.reason) == ("b" * 12, SHOWN)
    assert (root / "rolled-back.json").stat().st_mode & 0o777 == 0o644
    assert not (root / "x").exists()


def test_rollback_that_is_tried_again_keeps_the_first_note_and_a_later_one_replaces_it(
    root: Path,
) -> None:
    first = note(root, "first")
    assert first is not None
    assert note(root, "again, after an interruption") == first
    os.utime(root / "rolled-back.json", (50, 50))  # of an earlier deploy
    second = note(root, "second")
    assert second is not None
    assert second.reason == "second"


def test_rollback_notes_its_reason_before_services_start_again() -> None:
    (script,) = rollback.go_back._inner("too slow")  # type: ignore[attr-defined]
    assert script.index(str(paths.ROLLED_BACK)) < script.index("systemctl restart")
    assert "RECORD" not in script
