"""The commands for every day, as an operator gives them: `hivewright fleet ...`. The hosts are stand-ins."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


def hivewright(*arguments: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", "import sys; from worker import cli; cli.main(sys.argv[1:])", *map(str, arguments)],
        cwd=cwd,
        env={"PYTHONPATH": str(CHECKOUT), "PATH": "/usr/bin:/bin", "COLUMNS": "80", "HOME": str(cwd)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        ("rollout", "TYPO", "TYPO: no such file; expected an inventory file, a copy of inventory/example.py"),
        ("fleet stop", "TYPO", "TYPO: no such file; expected an inventory file, a copy of inventory/example.py"),
        ("fleet status", "flet.py", "flet.py: no such file; did you mean fleet.py?"),
        ("fleet logs", "nowhere/x", "nowhere/x: no such file; expected an inventory file"),
        ("fleet status", "folder", "folder: is no file; expected an inventory file"),
        ("fleet start", "empty.py", "empty.py: no hosts; expected lists of hosts, named coordinators and workers"),
        ("fleet status", "fleet.py", "fleet.py line 1: '[' was never closed; expected Python"),
    ],
)
def test_what_is_no_inventory_is_refused_in_a_line(command: str, name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "fleet.py").write_text("workers = [")
    (tmp_path / "empty.py").write_text("workers = []\n")
    done = hivewright(*command.split(), name, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "rollouts").exists()
