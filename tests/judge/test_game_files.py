"""The judge's files: the game in progress survives a restart, and foreign files are named."""

import json
import stat
from types import SimpleNamespace

import pytest

from worker import settings
from worker.errors import WorkerError
from worker.judge import past_games
from worker.judge.conductor import NO_CLUE, Conductor, State
from worker.judge.problems import Problem

PROBLEM = Problem(clues=("a ...", "a b\u2028c"), choices=("1", "\ud7ff"), answer=1, family="gcd")
STATES = [
    State(PROBLEM, salt=0),
    State(PROBLEM, salt=2**256 - 1),
    State(PROBLEM, 7, game=0, round=None),
    State(PROBLEM, 7, game=2**63 - 1, round=1, began_at=1798761600.25),
    State(PROBLEM, 7, block=2**40, is_told=True),
    State(PROBLEM.model_copy(update={"family": None}), 7),
]


MARKET = SimpleNamespace(client=SimpleNamespace(block_number=lambda: 41))
"""A chain that is asked for nothing else."""


def conductor(folder, problems=(PROBLEM,), **changes) -> Conductor:
    section = settings.Judge(state_dir=folder).model_copy(update=changes)
    return Conductor(section, MARKET, None, iter(problems))


@pytest.mark.parametrize("state", STATES)
def test_game_is_the_same_after_a_restart(tmp_path, state):
    conductor(tmp_path)._save(state)
    assert conductor(tmp_path)._state == state


def test_answer_and_salt_are_for_the_judge_alone(tmp_path):
    conductor(tmp_path)._save(STATES[0])
    assert stat.S_IMODE((tmp_path / "game.json").stat().st_mode) == 0o600


def test_salt_is_on_disk_before_the_game_is_opened_and_differs_each_time(tmp_path):
    salts = set()
    for number in range(3):
        judge = conductor(tmp_path / str(number))
        judge.step()
        kept = json.loads((tmp_path / str(number) / "game.json").read_text())
        assert (kept["game"], kept["block"]) == (None, 41)
        assert kept["problem"]["answer"] == 1
        salts.add(kept["salt"])
    assert len(salts) == 3
    assert min(salts) > 2**128


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"\0" * 100,
        b'{"problem": null, "salt": 1}',
        json.dumps({"problem": PROBLEM.model_dump(mode="json"), "salt": "x"}).encode(),
        json.dumps(
            {"problem": {"clues": ["x"], "choices": ["a"], "answer": 0}, "salt": 1}
        ).encode(),
    ],
)
def test_foreign_game_is_named_and_not_replaced(tmp_path, content):
    file = tmp_path / "game.json"
    file.write_bytes(content)
    with pytest.raises(WorkerError, match=r"game.json: not what a judge writes .*; move it away"):
        conductor(tmp_path)
    assert file.read_bytes() == content


def test_games_that_ended_are_kept_once_each_also_after_a_crash(tmp_path):
    judge = conductor(tmp_path)
    assert judge.past_games(9) == []
    for number in (3, 4):
        judge._end(State(PROBLEM, 1, game=number), "settled")
    # A crash after the line was written and before the game was forgotten.
    judge._save(State(PROBLEM, 1, game=4))
    again = conductor(tmp_path)
    again._end(again._state, "cancelled")
    past = conductor(tmp_path).past_games(9)
    assert [(game["game"], game["result"]) for game in past] == [(4, "cancelled"), (3, "settled")]
    assert past[1]["clues"] == list(PROBLEM.clues)
    assert again.past_games(1) == past[:1]
    assert not (tmp_path / "game.json").exists()
    assert again.clue() == NO_CLUE
    assert again.num_games == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [("games.jsonl", b'{"game": 1}\n{"ga'), ("reveals.json", b'[{"game": 1}]')],
)
def test_other_foreign_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WorkerError, match=rf"{name}: not what a judge writes"):
        conductor(tmp_path)


def test_oldest_past_games_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(past_games, "MAX_GAMES", 3)
    judge = conductor(tmp_path)
    for number in range(5):
        judge._end(State(PROBLEM, 1, game=number), "settled")
    for found in (judge, conductor(tmp_path)):
        assert [game["game"] for game in found.past_games(9)] == [4, 3, 2]
    assert len((tmp_path / "games.jsonl").read_text().splitlines()) == 3


def test_game_of_an_earlier_version_is_taken_over(tmp_path):
    """It had the transaction on its way in the same file."""
    kept = {"problem": PROBLEM.model_dump(mode="json"), "salt": 7, "game": 3, "round": 1}
    pending = {"call": "incrementRound", "raw": "00ff", "tx_hash": "0x" + "ab" * 32}
    (tmp_path / "game.json").write_text(json.dumps({**kept, "began_at": 5.0, "pending": pending}))
    assert conductor(tmp_path)._state == State(PROBLEM, 7, 3, 1, 5.0)


def test_no_game_is_planned_in_the_pause_or_beyond_the_limit(tmp_path):
    judge = conductor(tmp_path, pause_seconds=3600.0)
    judge._end(State(PROBLEM, 1, game=1), "settled")
    judge.step()
    assert not (tmp_path / "game.json").exists()
    judge = conductor(tmp_path, pause_seconds=0.0, max_games=1)
    judge._end(State(PROBLEM, 1, game=1), "settled")
    judge.step()
    assert not (tmp_path / "game.json").exists()
    more = conductor(tmp_path, pause_seconds=0.0, max_games=2)
    more._end(State(PROBLEM, 1, game=2), "settled")
    more.step()
    assert (tmp_path / "game.json").exists()
