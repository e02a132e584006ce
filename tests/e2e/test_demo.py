"""The main job through its own command: what it promises, and that it leaves nobody behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(420)]

ROUNDS = 4
WORKERS = 3


def start_demo(output: Path, rounds: int, workers: int = 1) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "worker",
        "demo",
        "--workers",
        str(workers),
        "--rounds",
        str(rounds),
    ]
    return subprocess.Popen(
        [*command, "--seed", "1", "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell's `&` does
    )


def processes_of(output: Path) -> list[str]:
    """Command lines of all processes that name the demo's folder, or that run out of it."""
    found = []
    for proc in Path("/proc").iterdir():
        if proc.name.isdecimal() and int(proc.name) != os.getpid():
            try:
                command = (
                    (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
            if str(output) in command:
                found.append(f"{proc.name}: {command}")
    return found


def wait_until(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def trained_rounds(output: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in output.glob("worker-*/rounds.jsonl"))


@pytest.fixture(scope="module")
def finished_demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    demo = start_demo(output, ROUNDS, WORKERS)
    text, _ = demo.communicate(timeout=400)
    return output, demo.returncode, text


def test_demo_exits_0_and_every_worker_trains_every_round(finished_demo):
    output, code, text = finished_demo
    assert code == 0, text
    workers = json.loads((output / "summary.json").read_text())["workers"]
    assert len({worker["peer_id"] for worker in workers}) == WORKERS
    for worker in workers:
        assert worker["rounds_trained"] == ROUNDS
        assert worker["rounds_reported"] == worker["rounds_with_step"]
        assert len(worker["peers_heard"]) == WORKERS - 1
        assert worker["registered"] is True
        assert (
            worker["rewards_confirmed"]
            == worker["rewards_earned"]
            == worker["rewards_audited"]
            == ROUNDS
        )
        assert all(0 <= reward <= 1 for reward in worker["rewards"].values())


def test_demo_workers_learn_from_their_peers_groups(finished_demo):
    output, _, text = finished_demo
    rounds = [
        json.loads(line)
        for file in output.glob("worker-*/rounds.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert sum(line["groups_external"] for line in rounds) > 0, text
    assert sum(sum(line["groups_rejected"].values()) for line in rounds) == 0, rounds


def test_demo_leaves_a_plot_the_logs_and_no_process(finished_demo):
    output, _, text = finished_demo
    assert (output / "rewards.png").read_bytes().startswith(b"\x89PNG")
    assert {
        "chain.log",
        "keeper.log",
        "account.log",
        "bootnode.log",
        "dashboard.log",
        "worker-0.log",
    } <= {file.name for file in (output / "logs").iterdir()}
    assert processes_of(output) == []
    assert max(len(line) for line in text.splitlines() if str(output) not in line) <= 80


def test_ledger_and_status_show_what_the_demo_did(finished_demo):
    output, _, _ = finished_demo
    file = output / "settings/worker-0.yaml"

    def hivewright(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "worker", *arguments, "--settings", str(file), "--json"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return json.loads(done.stdout)

    status = hivewright("status")
    assert status["rounds_trained"] == ROUNDS
    assert status["state"] == "stopped"
    rows = hivewright("ledger")
    assert len(rows) == ROUNDS
    assert status["ledger"]["confirmed"] == ROUNDS


@pytest.mark.parametrize(
    "stop",
    [signal.SIGINT]
    + [pytest.param(s, marks=pytest.mark.nightly) for s in (signal.SIGKILL, signal.SIGTERM)],
    ids=lambda s: s.name,
)
def test_interrupted_demo_leaves_no_process(tmp_path, stop):
    output = tmp_path / "out"
    demo = start_demo(output, 1000)
    try:
        wait_until(lambda: trained_rounds(output) > 0, 240, "a first round")
        os.kill(demo.pid, stop)
        code = demo.wait(60)
        assert code != 0
        wait_until(
            lambda: processes_of(output) == [],
            45,
            f"all processes ended, left: {processes_of(output)}",
        )
    finally:
        if demo.poll() is None:
            demo.kill()
        demo.communicate()


def test_worker_that_dies_ends_the_demo_with_one_line_that_says_which(tmp_path):
    output = tmp_path / "out"
    demo = start_demo(output, 1000)
    try:
        wait_until(lambda: trained_rounds(output) > 0, 240, "a first round")
        pid = json.loads((output / "worker-0/status.json").read_text())["pid"]
        os.kill(pid, signal.SIGKILL)
        text, _ = demo.communicate(timeout=90)
        assert demo.returncode == 9, text
        assert (
            "DemoFailed (exit 9): worker-0 was killed by SIGKILL, not by the demo"
            in text.splitlines()[-1]
        )
        wait_until(
            lambda: processes_of(output) == [],
            45,
            f"all processes ended, left: {processes_of(output)}",
        )
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.communicate()


def test_folder_with_files_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    demo = start_demo(tmp_path, 1)
    text, _ = demo.communicate(timeout=60)
    assert demo.returncode == 2
    assert "has files that no demo wrote" in text.splitlines()[-1]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
