"""The programs that seal secrets run in the host's release, which may be an earlier one."""

import subprocess
import sys
from pathlib import Path

import pytest

from deploys import backup_fetch, fleet_facts
from deploys.paths import CONFIGURATION, CURRENT

PROGRAM = "import sys\ndef seal(content, key): return f'{key} seals {content.decode()}\\n'\n"
MAIN = "if __name__ == '__main__': print('sealed for', *sys.argv[1:])\n"


@pytest.fixture(params=["backup_pack", "sealing"])
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Make a release whose module has its present or its earlier name."""
    folder = tmp_path / "current"
    (folder / "deploys").mkdir(parents=True)
    (folder / "deploys/__init__.py").touch()
    (folder / "deploys" / f"{request.param}.py").write_text(PROGRAM + MAIN)
    (folder / "environment/bin").mkdir(parents=True)
    python = folder / "environment/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder


def run(script: str, release: Path) -> str:
    script = script.replace(str(CURRENT), str(release)).replace(
        str(CONFIGURATION), str(release.parent)
    )
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout


def test_backup_is_sealed_by_the_release_that_is_there(release: Path, tmp_path: Path) -> None:
    assert (
        run(backup_fetch.seal_script("x25519:ab", str(tmp_path / "sealed")), release)
        .strip()
        .isdigit()
    )
    assert (tmp_path / "sealed").read_text() == "sealed for x25519:ab stream\n"


def test_token_is_sealed_by_the_release_that_is_there(release: Path, tmp_path: Path) -> None:
    (tmp_path / "enrolment.token").write_text("TOKEN")
    fact = fleet_facts.SealedToken()
    assert run(fact.command(key="x25519:ab"), release) == "x25519:ab seals TOKEN\nend\n"
