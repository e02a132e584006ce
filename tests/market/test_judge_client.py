"""The judge is not trusted: whatever it answers is a clue, or an error of one line."""

import json
from collections.abc import Iterator

import pytest

from tests.chain.desk import Desk, judging
from worker.errors import BadAnswer, ChainUnreachable
from worker.market import judge_client
from worker.market.judge_client import Clue, JudgeClient

CLUE = {"game_id": 3, "clue_id": 0, "rounds_remaining": 3, "clue": "1 + 1", "choices": ["2", "3"]}
NO_CLUE = {"game_id": -1, "clue_id": -1, "rounds_remaining": -1, "clue": "", "choices": []}


@pytest.fixture
def desk() -> Iterator[Desk]:
    with judging() as told:
        yield told


def saying(desk: Desk, body: object, status: int = 200) -> JudgeClient:
    """Return the client of a judge that answers everything like this."""
    desk.status = status
    desk.body = desk.past = body if isinstance(body, bytes) else json.dumps(body).encode()
    return JudgeClient(desk.url)


def test_clue_is_read_from_the_existing_address(desk):
    clue = saying(desk, CLUE).clue()
    assert (clue.game_id, clue.choices, clue.family, clue.is_open) == (3, ["2", "3"], None, True)
    assert desk.paths == ["/current_clue/"]
    JudgeClient(desk.url + "/").clue()
    assert desk.paths[-1] == "/current_clue/"


@pytest.mark.parametrize(
    ("changes", "is_open"),
    [
        ({}, True),
        ({"game_id": 0}, True),
        ({"game_id": -1}, False),
        ({"clue_id": -1}, False),
        ({"choices": ["a"]}, False),
        ({"choices": []}, False),
        ({"rounds_remaining": -1}, True),
        ({"unknown": "field"}, True),
        ({"game_id": 2**63 - 1, "clue_id": 2**31 - 1, "rounds_remaining": 10_000}, True),
        ({"clue": "x" * 20_000, "choices": ["a" * 1000] + ["b"] * 63, "family": "f" * 100}, True),
    ],
)
def test_clue_within_the_limits_is_taken(desk, changes, is_open):
    assert saying(desk, CLUE | changes).clue().is_open == is_open


def test_judge_without_a_game_has_no_clue(desk):
    assert not saying(desk, NO_CLUE).clue().is_open
    assert not saying(desk, {"game_id": -1, "clue_id": -1}).clue().is_open


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"game_id": 2**63}, "game_id"),
        ({"game_id": -2}, "game_id"),
        ({"game_id": "3"}, "game_id"),
        ({"game_id": 3.5}, "game_id"),
        ({"game_id": True}, "game_id"),
        ({"game_id": None}, "game_id"),
        ({"clue_id": 2**31}, "clue_id"),
        ({"rounds_remaining": 10_001}, "rounds_remaining"),
        ({"clue": "x" * 20_001}, "clue"),
        ({"clue": 7}, "clue"),
        ({"choices": ["a"] * 65}, "choices"),
        ({"choices": ["a", ""]}, "choices/1"),
        ({"choices": ["a", "b" * 1001]}, "choices/1"),
        ({"choices": "ab"}, "choices"),
        ({"family": "f" * 101}, "family"),
    ],
)
def test_clue_beyond_the_limits_is_a_bad_answer(desk, changes, where):
    with pytest.raises(BadAnswer) as error:
        saying(desk, CLUE | changes).clue()
    assert str(error.value).startswith(f"{desk.url}/current_clue/: {where}: ")
    assert str(error.value).endswith("; expected a clue")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"<html>", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'"\\ud800"']
)
def test_answer_of_something_else_is_a_bad_answer_of_one_short_line(desk, body):
    with pytest.raises(BadAnswer) as error:
        saying(desk, body).clue()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_answer_is_bounded(desk):
    with pytest.raises(BadAnswer, match=r"an answer of 262145 bytes; expected a clue"):
        saying(desk, b" " * (256 * 1024 + 1)).clue()
    spaces = b" " * (256 * 1024 - len(json.dumps(CLUE)))
    assert saying(desk, json.dumps(CLUE).encode() + spaces).clue().is_open


@pytest.mark.parametrize("status", [201, 204, 301, 302, 307, 404, 500, 503])
def test_other_status_is_a_judge_that_is_away_and_no_redirect_is_followed(desk, status):
    body = b"" if status == 204 else CLUE
    with pytest.raises(ChainUnreachable, match=rf"HTTP {status}; expected a clue") as error:
        saying(desk, body, status).clue()
    assert not isinstance(error.value, BadAnswer)


def test_judge_that_is_away_is_named():
    with pytest.raises(ChainUnreachable, match=r"^http://127.0.0.1:9/api/games: no answer \(Conn"):
        JudgeClient("http://127.0.0.1:9").past_games()


def test_judge_that_does_not_answer_in_time_is_away(desk, monkeypatch):
    monkeypatch.setattr(judge_client, "_SECONDS", 0.2)
    desk.pause_seconds = 60.0
    with pytest.raises(ChainUnreachable, match=r"no answer \((ReadTimeout|ConnectionError)\)"):
        saying(desk, CLUE).clue()


GAME = {"game": 3, "clues": ["a", "a b"], "choices": ["1", "2"], "family": "gcd", "answer": 1}


def test_past_games_are_read(desk):
    (game,) = saying(desk, {"games": [GAME]}).past_games()
    assert (game.game, game.clues[-1], game.choices, game.family) == (3, "a b", ("1", "2"), "gcd")
    assert saying(desk, {"games": []}).past_games() == []
    assert len(saying(desk, {"games": [GAME] * 1000}).past_games()) == 1000
    assert desk.paths[0] == "/api/games"


@pytest.mark.parametrize(
    "games",
    [
        None,
        [GAME] * 1001,
        [GAME | {"clues": []}],
        [GAME | {"clues": ["x"] * 65}],
        [GAME | {"game": -1}],
        [GAME | {"game": 2**63}],
        [GAME | {"choices": [""]}],
        [{"game": 3}],
        [7],
    ],
)
def test_past_games_beyond_the_limits_are_a_bad_answer(desk, games):
    with pytest.raises(BadAnswer, match="; expected the past games"):
        saying(desk, {"games": games}).past_games()


def test_clue_can_not_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Clue(game_id=1, clue_id=0).game_id = 2
