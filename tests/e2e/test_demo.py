"""The main job through its own command: what it promises, and that it leaves nobody behind.

The finished demo has a prediction market, too: bets, a settled game, claims, the record.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from worker.market.journal import Journal
from worker.runtime.state_dir import StateDir

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

# Long enough for a game to be settled and claimed.
ROUNDS = 8
WORKERS = 3
LINE = re.compile(
    r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] Game (\d+) Round (\d+):"
    r" (placed bet of \d+\.\d{3} on '.+'|claimed \d+\.\d{3} for the game|lost|no bet: .+)"
)


def start_demo(output: Path, rounds: int, workers: int = 1, *more: str) -> subprocess.Popen[str]:
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
        [*command, "--seed", "1", "--output", str(output), *more],
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
    demo = start_demo(output, ROUNDS, WORKERS, "--market")
    text, _ = demo.communicate(timeout=850)
    return output, demo.returncode, text


def test_demo_exits_0_and_every_worker_trains_every_round(finished_demo):
    output, code, text = finished_demo
    assert code == 0, text
    workers = json.loads((output / "summary.json").read_text())["workers"]
    assert len({worker["peer_id"] for worker in workers}) == WORKERS
    for worker in workers:
        assert worker["rounds_trained"] == ROUNDS
        assert worker["rounds_reported"] == worker["rounds_finished"]
        assert set(worker["rounds_with_step"]) <= set(worker["rounds_finished"])
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
        "judge.log",
        "worker-0.log",
    } <= {file.name for file in (output / "logs").iterdir()}
    assert processes_of(output) == []
    assert max(len(line) for line in text.splitlines() if str(output) not in line) <= 80


def test_ledger_and_status_show_what_the_demo_did(finished_demo):
    output, _, _ = finished_demo
    file = output / "settings/worker-0.yaml"

    def hivewright(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "worker", *arguments, "--settings", str(file)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout

    status = json.loads(hivewright("status", "--json"))
    assert status["rounds_trained"] == ROUNDS
    assert status["state"] == "stopped"
    assert status["market_brier"]
    assert all(0 <= score <= 2 for score in status["market_brier"].values())
    text = hivewright("status")
    assert "bets in the prediction market: " in text
    assert "Brier score of " in text
    rows = json.loads(hivewright("ledger", "--json"))
    assert len(rows) == ROUNDS
    assert status["ledger"]["confirmed"] == ROUNDS


def test_every_worker_bets_and_a_game_is_settled_and_claimed(finished_demo):
    output, _, _ = finished_demo
    workers = json.loads((output / "summary.json").read_text())["workers"]
    for worker in workers:
        assert sum(worker["bets"].get(state, 0) for state in ("paid", "lost")) > 0, worker["bets"]
    assert sum(worker["bets"].get("paid", 0) for worker in workers) > 0
    games = [json.loads(line) for line in (output / "judge/games.jsonl").read_text().splitlines()]
    assert {game["result"] for game in games} == {"settled"}
    assert all(game["family"] for game in games)


def test_record_has_a_line_for_each_bet_in_the_form_of_the_guide(finished_demo):
    output, _, _ = finished_demo
    for number in range(WORKERS):
        folder = StateDir(output / f"worker-{number}")
        lines = folder.market_record.read_text().splitlines()
        assert folder.market_record.name == "prg_record.txt"
        assert all(LINE.fullmatch(line) for line in lines), lines
        placed = [LINE.fullmatch(line).groups()[:2] for line in lines if "placed bet" in line]
        journal = Journal(folder.bets)
        rows = journal._database.execute(
            "SELECT game, round FROM bets WHERE state IN ('confirmed', 'claiming', 'paid', 'lost')"
            " ORDER BY game, round"
        )
        journal.close()
        assert sorted((int(game), int(round)) for game, round in placed) == rows


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


@pytest.mark.nightly  # tests/commands/test_demo_processes.py sees the same without a swarm
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
