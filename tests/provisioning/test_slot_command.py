"""A command as a slot's worker: the shell commands, run by a real shell with a stand-in."""

import subprocess
from pathlib import Path

import pytest

from deploys import slot_command
from deploys.slot_command import MODEL_TOKEN, as_slot, folders_of_slot

STAND_IN = """#!/bin/sh
printf '%s\\n' "$@"
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs shell commands and returns the arguments of systemd-run."""
    program = tmp_path / "bin" / "systemd-run"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setattr(slot_command.paths, "UNITS", tmp_path)

    def arguments(script: str) -> list[str]:
        path = f"{program.parent}:/usr/bin:/bin"
        process = subprocess.run(
            ["sh", "-euc", script], env={"PATH": path}, capture_output=True, text=True, check=True
        )
        return process.stdout.splitlines()

    return arguments


def write_drop_in(folder: Path, text: str) -> None:
    drop_ins = folder / "hivewright-worker@3.service.d"
    drop_ins.mkdir()
    (drop_ins / "own.conf").write_text(text)


def test_command_runs_with_the_settings_of_its_slot(run) -> None:
    given = run(as_slot(3, "eval --before", *folders_of_slot(3)))
    program = given[next(n for n, each in enumerate(given) if each.endswith("/python")) :]
    assert program[1:6] == ["-B", "-m", "worker", "eval", "--before"]
    assert program[6] == "--settings"
    assert program[7].endswith("/worker-3.yaml")
    assert "--wait" in given
    assert "--property=ProtectSystem=strict" in given
    assert [each for each in given if each.startswith("--property=BindPaths=")] == [
        "--property=BindPaths=/var/lib/hivewright/worker-3 /var/cache/hivewright/worker-3"
    ]


def test_drop_ins_of_the_worker_count_for_the_command_too(run, tmp_path) -> None:
    write_drop_in(
        tmp_path,
        "[Service]\nEnvironment=HTTPS_PROXY=http://proxy:3128 NO_PROXY=*\nMemoryMax=8G\n"
        "CPUQuota=200%\nExecStart=/bin/evil\n#Environment=A=1\nMemoryHigh=\n",
    )
    given = run(as_slot(3, "eval"))
    assert "--property=Environment=HTTPS_PROXY=http://proxy:3128 NO_PROXY=*" in given
    assert "--property=MemoryMax=8G" in given
    assert "--property=CPUQuota=200%" in given
    assert not any("evil" in each or "A=1" in each or "MemoryHigh" in each for each in given)


def test_drop_ins_of_other_slots_do_not_count(run, tmp_path) -> None:
    write_drop_in(tmp_path, "MemoryMax=8G\n")
    assert "--property=MemoryMax=8G" not in run(as_slot(4, "eval"))


def test_credential_is_named_where_only_the_unit_knows_its_place(run) -> None:
    given = run(as_slot(0, "fetch", f"LoadCredential={MODEL_TOKEN}:/etc/hivewright/{MODEL_TOKEN}"))
    assert given[-3:-1] == ["/bin/sh", "-c"]
    assert given[-1].startswith("exec ")
    assert given[-1].endswith(f' --token-file "$CREDENTIALS_DIRECTORY/{MODEL_TOKEN}"')


def test_rest_is_shell_text_after_the_command(run, tmp_path) -> None:
    out = tmp_path / "out file"
    assert run(as_slot(0, "eval", rest=f"--json > '{out}'")) == []
    assert out.read_text().splitlines()[-1] == "--json"
