"""The release that a process runs from, as a deploy leaves it."""

import os
from pathlib import Path

from worker.runtime.running_release import current

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
