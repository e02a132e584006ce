"""The demo's comparison of a worker's history with the chain."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from worker.commands.demo import Demo

ROUNDS = [0, 1, 2]
GOOD: dict[str, Any] = {
    "name": "worker-0",
    "peer_id": "Qm0",
    "bets": {},
    "rounds_trained": 3,
    "rounds_reported": ROUNDS,
    "rounds_finished": ROUNDS,
    "rounds_with_step": ROUNDS,
    "peers_heard": ["Qm1"],
    "registered": True,
    "rewards_earned": 3,
    "rewards_confirmed": 3,
    "rewards_audited": 3,
}


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    return Demo(tmp_path, 2, 3, 0, Console(file=io.StringIO()))


def test_round_without_a_step_is_reported(demo: Demo) -> None:
    skipped = GOOD | {"rounds_reported": [0, 1, 2, 3], "rounds_finished": [0, 1, 2, 3]}
    assert demo._problems(GOOD, 2) == demo._problems(skipped, 2) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rounds_trained": 2}, "worker-0 trained 2 rounds, expected 3"),
        (
            {"rounds_reported": [0, 2, 7]},
            (
                "worker-0 reported rounds [7] that it did not finish, and not the rounds [1] that"
                " it did"
            ),
        ),
        ({"peers_heard": []}, "worker-0 heard 0 peers, expected 1"),
        ({"registered": False}, "worker-0 (Qm0) is not registered on the chain"),
        ({"rewards_confirmed": 2}, "the chain confirms 2 of 3 rewards of worker-0"),
        (
            {"rewards_audited": 2},
            ("the groups that worker-0 signed confirm 2 of 3 rewards of it (audit/audit.json)"),
        ),
    ],
)
def test_difference_is_a_problem(demo: Demo, change: dict[str, Any], problem: str) -> None:
    assert demo._problems(GOOD | change, 2) == [problem]
