"""Games that end whenever and wherever the judge is killed."""

import contextlib
import itertools
from pathlib import Path

import pytest

from tests.chain.hall import Hall
from tests.chain.own_chain import ask
from worker import settings
from worker.chain.client import ChainClient, Underpriced
from worker.chain.market import TOKEN, GameStatus
from worker.errors import ContractRefused
from worker.judge import conductor, past_games, reveals
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
        # As the service does: what was sent before a kill may be mined between two reads.
        with contextlib.suppress(ContractRefused):
            judge.step()
        if judge.num_games:
            return
    raise AssertionError("the game does not end")


def step_until(hall: Hall, judge: Conductor, condition) -> None:
    """Step, each time until what was sent is mined."""
    for _ in range(40):
        if condition():
            return
        judge.step()
        for entry in judge._sender.waiting():
            hall.market.client.wait_for_receipt(entry.hash, 10)
    raise AssertionError("not in time")


def test_game_is_opened_advanced_and_settled(hall, tmp_path):
    judge = make(hall, tmp_path, round_seconds=3600.0)
    assert judge.clue() == NO_CLUE
    step_until(hall, judge, lambda: judge.clue() != NO_CLUE)
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
    (past,) = make(hall, tmp_path).past_games(9)
    assert (past["game"], past["result"], past["answer"]) == (0, "settled", 1)
    assert list(tmp_path.glob("game.json")) == []


def test_game_that_the_log_shows_late_is_not_opened_twice(hall, tmp_path, monkeypatch):
    opened_by = type(hall.market).opened_by
    answers = []

    def late(self, *arguments):
        found = opened_by(self, *arguments)
        answers.append(found)
        return None if answers.count(0) < conductor.LOOKS else found

    monkeypatch.setattr(type(hall.market), "opened_by", late)
    judge = make(hall, tmp_path, round_seconds=3600.0)
    step_until(hall, judge, lambda: judge.clue() != NO_CLUE)
    assert answers == [None, *[0] * conductor.LOOKS]
    assert hall.market.num_games() == 1


def test_answer_is_not_in_the_clue_nor_readable_for_others(hall, tmp_path):
    judge = make(hall, tmp_path, round_seconds=3600.0)
    step_until(hall, judge, lambda: judge.clue() != NO_CLUE)
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

    for module in (conductor, past_games, reveals):
        monkeypatch.setattr(module, "write_whole", killing(module.write_whole))
    for name in ("send_raw", "send_all_raw"):
        monkeypatch.setattr(ChainClient, name, killing(getattr(ChainClient, name)))
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
        recorded = [game["game"] for game in make(hall, folder).past_games(9)]
        assert recorded.count(before) == 1
        if num_kills < point:
            break
    assert num_kills > 20


def test_game_that_the_chain_has_forgotten_is_given_up(hall, tmp_path):
    judge = make(hall, tmp_path, round_seconds=3600.0)
    judge.step()
    judge._save(conductor.replace(judge._state, game=99))
    judge.step()
    assert [game["result"] for game in judge.past_games(9)] == ["lost"]
    run_game(make(hall, tmp_path))
    assert hall.market.game(0).status == GameStatus.SETTLED


# ---- a chain that loses its last seconds, or asks for more


def test_transaction_that_waits_for_a_lost_nonce_is_numbered_again(hall, tmp_path):
    """The chain comes back from before the game was opened, with the next call on its way."""
    before = ask(hall.chain, "evm_snapshot")
    judge = make(hall, tmp_path, round_seconds=3600.0)
    step_until(hall, judge, lambda: judge.clue() != NO_CLUE)
    ask(hall.chain, "evm_setAutomine", False)
    try:
        judge = make(hall, tmp_path)
        judge.step()
        (waiting,) = judge._sender.waiting()
        ask(hall.chain, "evm_revert", before)
    finally:
        ask(hall.chain, "evm_setAutomine", True)
    assert waiting.nonce > hall.market.client.nonce(hall.judge.address)
    judge = make(hall, tmp_path)
    run_game(judge)
    assert [game["result"] for game in judge.past_games(9)] == ["lost"]
    run_game(make(hall, tmp_path))
    assert hall.market.game(0).status == GameStatus.SETTLED


def test_call_that_pays_too_little_is_sent_for_more(hall, tmp_path, monkeypatch):
    """A chain whose price rises after the transaction was signed."""
    ask(hall.chain, "anvil_setBalance", hall.judge.address, hex(10**20))
    judge = make(hall, tmp_path, round_seconds=3600.0)
    step_until(hall, judge, lambda: judge.clue() != NO_CLUE)
    sent = []

    def refuse_at_first(self, raw):
        sent.append(raw)
        if len(sent) == 1:
            raise Underpriced("gas price too low", 7)
        return send_raw(self, raw)

    send_raw = ChainClient.send_raw
    monkeypatch.setattr(ChainClient, "send_all_raw", lambda self, raws: [False] * len(raws))
    monkeypatch.setattr(ChainClient, "send_raw", refuse_at_first)
    monkeypatch.setattr(ChainClient, "raised_price", lambda self, price_wei, refused: 7)
    judge = make(hall, tmp_path)
    step_until(hall, judge, lambda: hall.market.game(0).round == 1)
    assert len(sent) == 2
    assert sent[0] != sent[1]


def test_reveal_that_the_chain_forgot_is_sent_again(hall, tmp_path):
    """Also by a judge that was started since; those who won are paid after all."""
    judge = make(hall, tmp_path)
    step_until(hall, judge, lambda: hall.market.num_games() == 1)
    hall.bet(0, "anna", 0, 1, TOKEN)
    step_until(hall, judge, lambda: hall.market.game(0).status == GameStatus.CLOSED)
    before = ask(hall.chain, "evm_snapshot")
    run_game(judge)
    assert not (tmp_path / "game.json").exists()
    ask(hall.chain, "evm_revert", before)
    assert hall.market.game(0).status == GameStatus.CLOSED
    make(hall, tmp_path).step()
    assert hall.market.game(0).status == GameStatus.SETTLED
    assert hall.claim(0, "anna") == TOKEN


@pytest.mark.parametrize("is_ended", [True, False])
def test_game_that_takes_bets_again_with_a_known_answer_is_not_settled(hall, tmp_path, is_ended):
    """The chain comes back from before the last round's end, after the answer was revealed."""
    judge = make(hall, tmp_path)
    step_until(hall, judge, lambda: hall.market.num_games() == 1)
    before = ask(hall.chain, "evm_snapshot")
    step_until(hall, judge, lambda: hall.market.game(0).status == GameStatus.SETTLED)
    if is_ended:
        run_game(judge)
    ask(hall.chain, "evm_revert", before)
    judge = make(hall, tmp_path, pause_seconds=0.0)
    step_until(hall, judge, lambda: hall.market.num_games() == 2)
    assert hall.market.game(0).status == GameStatus.OPEN
    assert hall.market.game(0).round == 0
    assert judge.clue()["game_id"] != 0
