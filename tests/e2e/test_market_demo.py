"""`hivewright demo --market` through its own command: bets, a settled game, claims, the record."""

import json
import re
import subprocess
import sys

import pytest

from worker.market.journal import Journal
from worker.runtime.state_dir import StateDir

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

WORKERS, ROUNDS = 2, 8
LINE = re.compile(
    r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] Game (\d+) Round (\d+):"
    r" (placed bet of \d+\.\d{3} on '.+'|claimed \d+\.\d{3} for the game|lost|no bet: .+)"
)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "worker", "demo", "--workers", str(WORKERS), "--market"]
    options = ["--rounds", str(ROUNDS), "--seed", "1", "--output", str(folder)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_worker_bets_and_a_game_is_settled_and_claimed(output):
    workers = json.loads((output / "summary.json").read_text())["workers"]
    assert len(workers) == WORKERS
    for worker in workers:
        assert sum(worker["bets"].get(state, 0) for state in ("paid", "lost")) > 0, worker["bets"]
    assert sum(worker["bets"].get("paid", 0) for worker in workers) > 0
    games = [json.loads(line) for line in (output / "judge/games.jsonl").read_text().splitlines()]
    assert {game["result"] for game in games} == {"settled"}
    assert all(game["family"] for game in games)


def test_record_has_a_line_for_each_bet_in_the_form_of_the_guide(output):
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


def test_status_tells_bets_and_calibration(output):
    file = output / "settings/worker-0.yaml"
    command = [sys.executable, "-m", "worker", "status", "--settings", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "bets in the prediction market: " in text
    assert "Brier score of " in text
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=120, check=True
    )
    by_family = json.loads(done.stdout)["market_brier"]
    assert by_family
    assert all(0 <= score <= 2 for score in by_family.values())
