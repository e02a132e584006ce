"""The judge's HTTP interface, called as the existing clients call it."""

import pytest
import requests
from account_service import eventually, serving_role

from worker import settings
from worker.chain.embedded import anvil
from worker.environments.presets import DEMO_FAMILIES
from worker.judge import server
from worker.judge.server import Service

SECONDS = 10


@pytest.fixture
def judge(hall, tmp_path, monkeypatch):
    """Run a judge with a first round that does not end; yield its URL."""
    monkeypatch.setattr(server, "QUESTIONS_BURST", 4.0)
    monkeypatch.setattr(server, "QUESTIONS_PER_SECOND", 0.001)
    keeper = hall.chain.settings.keeper.state_dir
    raw = {
        "chain": {"deployment_file": str(keeper / anvil.DEPLOYMENT_FILE), "poll_seconds": 0.05},
        "judge": {
            "state_dir": str(tmp_path / "judge"),
            "key_file": str(keeper / anvil.JUDGE_KEY_FILE),
            "round_seconds": 3600.0,
        },
        "environment": {"families": [family.model_dump() for family in DEMO_FAMILIES]},
    }
    with serving_role(Service(settings.parse(raw, "test"))) as url:
        yield url


def test_clue_is_that_of_the_game_on_the_chain(hall, judge):
    def clue():
        return requests.get(f"{judge}/current_clue/", timeout=SECONDS).json()

    assert clue().keys() == {"game_id", "clue_id", "rounds_remaining", "clue", "choices"}
    eventually(lambda: clue()["game_id"] == 0)
    found = clue()
    assert (found["clue_id"], found["rounds_remaining"], len(found["choices"])) == (0, 3, 4)
    assert hall.market.read("choiceCount", 0) == 4
    assert requests.get(f"{judge}/api/games", timeout=SECONDS).json() == {"games": []}


def test_question_is_answered_once(judge):
    asked = {"user_id": "me", "round_number": 3, "model_name": "tiny"}
    got = requests.post(f"{judge}/request-question/", json=asked, timeout=SECONDS).json()
    assert got.keys() == {"session_id", "question"}
    answer = {"session_id": got["session_id"], "round_number": 3, "user_answer": "no idea"}
    submit = f"{judge}/submit-answer/"
    first = requests.post(submit, json=answer, timeout=SECONDS)
    assert (first.status_code, first.json()) == (200, {"score": 0.0})
    again = requests.post(submit, json=answer, timeout=SECONDS)
    assert again.status_code == 404
    assert "not open" in again.json()["error"]


@pytest.mark.parametrize("body", [{}, {"session_id": 1, "round_number": -1, "user_answer": "x"}])
def test_wrong_bodies_are_refused_in_one_line(judge, body):
    found = requests.post(f"{judge}/submit-answer/", json=body, timeout=SECONDS)
    assert found.status_code == 400
    assert found.json()["error"].startswith("/submit-answer/: session_id")


def test_one_address_does_not_use_up_the_open_questions(judge):
    asked = {"user_id": "me", "round_number": 3, "model_name": "tiny"}
    codes = [
        requests.post(f"{judge}/request-question/", json=asked, timeout=SECONDS).status_code
        for _ in range(6)
    ]
    assert codes[:4] == [200] * 4
    assert codes[-1] == 429
