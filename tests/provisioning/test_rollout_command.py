"""`hivewright rollout` as an operator runs it, over 20 hosts; pyinfra is a stand-in."""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploys.fleet import options, pyinfra_process, rollout_command
from lab.process import wait_until
from worker.errors import ReleaseRefused, SettingsError, WorkerError

STAND_IN = Path(__file__).with_name("stand_in_pyinfra.py")
NEW = "b" * 40
HOSTS = [f"gpu-{number:02}" for number in range(1, 21)]


def write_inventory(folder: Path, bad: str) -> Path:
    inventory = folder / "fleet.py"
    data = {"release_repository": "https://git.example.org/h.git", "release_ref": NEW}
    inventory.write_text(json.dumps({"hosts": HOSTS, "bad": bad, "data": data}))
    return inventory


def rollout(folder: Path, bad: str, *arguments: str) -> None:
    inventory = write_inventory(folder, bad)
    parser = argparse.ArgumentParser()
    options.rollout(parser)
    rollout_command.run(
        parser.parse_args([str(inventory), "--output", str(folder / "out"), *arguments])
    )


def commits(folder: Path) -> dict[str, str]:
    return {
        file.stem: json.loads(file.read_text())["commit"]
        for file in (folder / "fleet.state").glob("*.json")
    }


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out/report.json").read_text())
    return found


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyinfra_process, "PYINFRA", (sys.executable, str(STAND_IN)))
    monkeypatch.setattr(rollout_command, "heed_signals", lambda: None)
    monkeypatch.setenv("COLUMNS", "80")


def test_bad_release_meets_one_of_twenty_and_the_others_are_not_touched(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ReleaseRefused, match=r"gpu-01: worker@0 ended with code 1.*it is broken"):
        rollout(tmp_path, bad=NEW)
    assert commits(tmp_path) == {"gpu-01": "a" * 40}
    fates = [host["fate"] for host in report(tmp_path)["hosts"].values()]
    assert (fates.count("rolled-back"), fates.count("pending")) == (1, 19)
    said = capfd.readouterr().out
    assert "1 rolled-back, 19 untouched" in said
    assert max(map(len, said.splitlines())) <= 80


def test_interrupted_rollout_ends_what_it_began_and_resumes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fleet.slow").touch()
    program = "import sys; from deploys.fleet import pyinfra_process; from worker import cli"
    program += (
        f"; pyinfra_process.PYINFRA = (sys.executable, {str(STAND_IN)!r}); cli.main(sys.argv[1:])"
    )
    inventory = write_inventory(tmp_path, bad="")
    command_line = [
        sys.executable,
        "-c",
        program,
        "rollout",
        inventory,
        "--output",
        tmp_path / "out",
    ]
    with subprocess.Popen(
        command_line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        try:
            wait_until(
                lambda: (tmp_path / "out/gpu-01.log").exists(),
                60,
                "the first host is being deployed",
            )
            running.send_signal(signal.SIGINT)
            said = running.communicate(timeout=30)[0]
        finally:
            running.kill()
    assert running.returncode == 130, said
    assert "`hivewright rollout --resume" in said
    assert report(tmp_path)["result"] == "interrupted"
    assert report(tmp_path)["hosts"]["gpu-01"]["fate"] == "pending"
    (tmp_path / "fleet.slow").unlink()
    rollout(tmp_path, "", "--batch", "100%", "--resume")
    assert commits(tmp_path) == dict.fromkeys(HOSTS, NEW)


def test_good_release_reaches_twenty_in_batches(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rollout(tmp_path, "", "--batch", "50%")
    assert commits(tmp_path) == dict.fromkeys(HOSTS, NEW)
    batches = [host["batch"] for host in report(tmp_path)["hosts"].values()]
    assert [batches.count(number) for number in (1, 2, 3)] == [1, 10, 9]
    assert "20 done" in capfd.readouterr().out


def test_host_that_is_done_without_something_is_done_and_the_report_says_without_what(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fleet.but").touch()
    with pytest.raises(
        WorkerError, match=r"all hosts have it, but 20 of 20 lack something \(gpu-01, .*"
    ) as raised:
        rollout(tmp_path, "", "--batch", "100%")
    assert raised.value.exit_code == 1
    assert commits(tmp_path) == dict.fromkeys(HOSTS, NEW)
    for name, host in report(tmp_path)["hosts"].items():
        assert host["fate"] == "done", name
        assert (
            host["reason"] == "but tailscale_serve: 443: its tailnet has no HTTPS certificates"
        ), name
    said = "".join(capfd.readouterr())
    assert "20 done" in said
    assert "gpu-01: done, but tailscale_serve: 443: its tailnet has no HTTPS certificates" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resume",), "there is no rollout to resume"),
        (("--batch", "0"), "--batch: got '0'"),
        (("--output", "{folder}/fleet.py"), "--output .*/fleet.py: File exists; expected a folder"),
        (
            ("--output", "/proc/nowhere/x"),
            "--output /proc/nowhere/x: No such file or directory; expected a folder",
        ),
    ],
)
def test_refused_rollout_leaves_nothing_and_says_why_in_a_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        rollout(tmp_path, "", *(word.format(folder=tmp_path) for word in arguments))
    assert commits(tmp_path) == {}
    assert not (tmp_path / "out").exists()


def test_wrong_inventory_is_refused_by_a_rollout_before_any_host_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real pyinfra, with a deploy's messages; a connection to these hosts would fail."""
    monkeypatch.setattr(pyinfra_process, "PYINFRA", (sys.executable, "-m", "pyinfra"))
    data = {
        "release_repository": "h.git",
        "release_ref": NEW,
        "ssh_port": 1,
        "swarm_enabled": False,
    }
    named = [
        (f"gpu-{number}", data | {"slots": 1, "trainer_epsilonn": number}) for number in range(2)
    ]
    (tmp_path / "wrong.py").write_text(f"workers = {[*named, ('gpu-9', data)]!r}\n")
    parser = argparse.ArgumentParser()
    options.rollout(parser)
    with pytest.raises(SettingsError) as refused:
        rollout_command.run(
            parser.parse_args([str(tmp_path / "wrong.py"), "--output", str(tmp_path / "out")])
        )
    first, *lines = str(refused.value).splitlines()
    assert first.endswith("2 mistakes; nothing was done on any host")
    assert lines[0].startswith("inventory data of gpu-0, gpu-1: trainer_epsilonn: not a known key")
    assert lines[1].startswith("inventory data of gpu-9: slots: none")
    assert not (tmp_path / "out").exists()


def test_inventory_is_found_from_where_the_operator_is_and_its_resume_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inventory(tmp_path, bad="")
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    options.rollout(parser)
    rollout_command.run(parser.parse_args(["fleet.py"]))
    assert json.loads((tmp_path / "rollouts/fleet/report.json").read_text())["inventory"] == str(
        tmp_path / "fleet.py"
    )
    rollout_command.run(parser.parse_args([str(tmp_path / "fleet.py"), "--resume"]))
