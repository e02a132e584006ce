"""Games that end whenever and wherever the judge is killed."""

import itertools
from pathlib import Path

from tests.chain.hall import Hall
from worker import settings
from worker.chain.client import ChainClient
from worker.chain.market import TOKEN, GameStatus
from worker.judge import conductor
from worker.judge.conductor import NO_CLUE, Conductor
from worker.judge.problems import Problem

PROBLEM = Problem(clues=("one", "one two"), choices=("a", "b", "c"), answer=1)


class Killed(BaseException):
    """The process ends here."""


def make(hall: Hall, folder: Path, **changes) -> Conductor:
    section = settings.Judge(state_dir=folder, round_seconds=1e-6, pause_seconds=0.0)
    section = section.model_copy(update=changes)
    return Conductor(section, hall.market, hall.judge, itertools.repeat(PROBLEM))


def run_game(judge: Conductor) -> None:
    for _ in range(40):
        judge.step()
        if judge.num_games:
            return
    raise AssertionError("the game does not end")


def test_game_is_opened_advanced_and_settled(hall, tmp_path):
    judge = make(hall, tmp_path, round_seconds=3600.0)
    assert judge.clue() == NO_CLUE
    for _ in range(3):
        judge.step()
    assert judge.clue() == {
        "game_id": 0,
        "clue_id": 0,
        "rounds_remaining": 2,
        "clue": "one",
        "choices": ["a", "b", "c"],
    }
    hall.bet(0, "anna", 0, 1, TOKEN)
    run_game(make(hall, tmp_path))
    game = hall.market.game(0)
    assert (game.status, game.right_choice) == (GameStatus.SETTLED, 1)
    assert hall.claim(0, "anna") == TOKEN
    (past,) = make(hall, tmp_path).past_games()
    assert (past["game"], past["result"], past["answer"]) == (0, "settled", 1)
    assert list(tmp_path.glob("game.json")) == []


def test_answer_is_not_in_the_clue_nor_readable_for_others(hall, tmp_path):
    judge = make(hall, tmp_path, round_seconds=3600.0)
    for _ in range(3):
        judge.step()
    assert "answer" not in judge.clue()
    assert (tmp_path / "game.json").stat().st_mode & 0o077 == 0


def test_kill_at_any_write_or_send_leaves_no_stuck_game(hall, tmp_path, monkeypatch):
    """Kill before, and after, each write to disk and each transaction of a game."""
    calls_left = [0]

    def killing(function):
        def wrapped(*arguments, **options):
            calls_left[0] -= 1
            if calls_left[0] == 0:
                raise Killed
            result = function(*arguments, **options)
            calls_left[0] -= 1
            if calls_left[0] == 0:
                raise Killed
            return result

        return wrapped

    monkeypatch.setattr(conductor, "write_whole", killing(conductor.write_whole))
    monkeypatch.setattr(ChainClient, "send_raw", killing(ChainClient.send_raw))
    num_kills = 0
    for point in itertools.count(1):
        folder = tmp_path / str(point)
        folder.mkdir()
        before = hall.market.num_games()
        calls_left[0] = point
        try:
            run_game(make(hall, folder))
        except Killed:
            num_kills += 1
            calls_left[0] = 0
            run_game(make(hall, folder))
        # One game, whatever happened, and it is settled.
        assert hall.market.num_games() == before + 1
        assert hall.market.game(before).status == GameStatus.SETTLED
        recorded = [game["game"] for game in make(hall, folder).past_games()]
        assert recorded.count(before) == 1
        if num_kills < point:
            break
    assert num_kills > 20


def test_game_that_the_chain_has_forgotten_is_given_up(hall, tmp_path):
    judge = make(hall, tmp_path, round_seconds=3600.0)
    judge.step()
    state = judge._state
    judge._save(conductor.replace(state, game=99))
    judge.step()
    assert [game["result"] for game in judge.past_games()] == ["lost"]
    run_game(make(hall, tmp_path))
    assert hall.market.game(0).status == GameStatus.SETTLED
