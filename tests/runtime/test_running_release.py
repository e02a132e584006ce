"""The release that a process runs from, as a deploy leaves it."""

import json
import os
from pathlib import Path

import pytest

from worker.errors import WorkerError
from worker.runtime.running_release import RolledBack, current, last_rollback

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_release_is_named_with_the_time_it_became_current(tmp_path: Path) -> None:
    release = tmp_path / "releases" / COMMIT
    release.mkdir(parents=True)
    link = tmp_path / "current"
    assert current(release) == (COMMIT[:12], None)
    link.symlink_to(release)
    os.utime(link, (5.0, 5.0), follow_symlinks=False)
    assert current(release) == (COMMIT[:12], 5.0)
    other = tmp_path / "releases" / "other"
    other.mkdir()
    link.unlink()
    link.symlink_to(other)
    assert current(release) == (COMMIT[:12], None)


def test_checkout_is_no_release(tmp_path: Path) -> None:
    assert current(tmp_path) is None


def test_last_rollback_is_read_with_its_time(tmp_path: Path) -> None:
    release = tmp_path / "releases" / COMMIT
    release.mkdir(parents=True)
    assert last_rollback(release) is None
    file = tmp_path / "rolled-back.json"
    file.write_text(json.dumps({"release": COMMIT, "reason": 'no "round"'}))
    os.utime(file, (7.0, 7.0))
    assert last_rollback(release) == RolledBack(COMMIT[:12], 'no "round"', 7.0)
    assert last_rollback(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"release": 1, "reason": "x"}'])
def test_note_of_a_rollback_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    release = tmp_path / "releases" / COMMIT
    release.mkdir(parents=True)
    (tmp_path / "rolled-back.json").write_text(text)
    with pytest.raises(WorkerError, match=r"rolled-back\.json: not the record of a rollback"):
        last_rollback(release)
