"""A new release on a host, through real shells."""

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploys import release
from deploys.facts import Deploys, InstalledReleases, PastDeploys, Releases
from deploys.paths import ENVIRONMENTS, RELEASES, WHEELS

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A release with an environment that can run `hivewright check`."""
    (tmp_path / "release/environment/bin").mkdir(parents=True)
    (tmp_path / "release/worker").symlink_to(CHECKOUT / "worker")
    python = tmp_path / "release/environment/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path / "release"


def check(text: str, checkout: Path, file: Path) -> subprocess.CompletedProcess[str]:
    script = release.check_script(checkout, file, "root")
    encoded = base64.b64encode(text.encode()).decode()
    return subprocess.run(
        ["sh", "-c", script], input=encoded, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
def test_release_checks_settings_before_they_are_installed(checkout: Path, tmp_path: Path) -> None:
    file = tmp_path / "worker-0.yaml"
    file.write_text("# what runs now\n")
    done = check("environment:\n  families:\n  - name: basic_arithmetic\n", checkout, file)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = check("environment:\n  families:\n  - name: basic_arithmetics\n", checkout, file)
    assert done.returncode == 2
    first, last = done.stderr.splitlines()
    assert first.startswith("hivewright check: SettingsError (exit 2): ")
    assert "basic_arithmetics" in first
    assert (
        last
        == f"{file} is left as it was, and so is all that runs; fix the inventory and run again"
    )
    assert file.read_text() == "# what runs now\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release", "worker-0.yaml"]


@pytest.mark.parametrize(
    ("previous", "removed"), [(None, "ab"), ("d", "ab"), ("a", "b"), ("unknown", "ab")]
)
def test_three_releases_are_kept_and_the_one_to_go_back_to_and_what_they_use(
    previous: str | None, removed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed in this order: a to e, the current one. d and e share one; 0 is unused."""
    uses = {commit: ENVIRONMENTS / ("d" if commit == "e" else commit) for commit in "edcba"}
    parts = {commit: frozenset({environment}) for commit, environment in uses.items()}
    folders = {*uses.values(), ENVIRONMENTS / "0", WHEELS / "0"}
    answers = {
        Releases: InstalledReleases("e", parts, frozenset(folders)),
        PastDeploys: Deploys("x", previous),
    }
    monkeypatch.setattr(
        release, "host", type("Host", (), {"get_fact": staticmethod(answers.__getitem__)})
    )
    commands = [command.split(" && ")[0] for command in release.prune._inner()]
    gone = [
        *(RELEASES / commit for commit in removed),
        *(ENVIRONMENTS / commit for commit in "0" + removed),
        WHEELS / "0",
    ]
    assert sorted(commands) == sorted(f"rm -rf {folder}" for folder in gone)
