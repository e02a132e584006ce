"""A node's bets on a real chain, with judges of every kind."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.chain.desk import Desk, judging
from tests.chain.hall import Hall, open_hall
from tests.chain.own_chain import ask, own_chain, skip_seconds
from worker import settings
from worker.chain.market import TOKEN, GameStatus, Market
from worker.errors import BadAnswer, ChainUnreachable, ContractRefused, NotScored
from worker.market import judge_client
from worker.market.journal import UNKNOWN_FAMILY, Journal, Row
from worker.market.judge_client import JudgeClient
from worker.market.player import Player


@pytest.fixture
def desk() -> Iterator[Desk]:
    with judging() as told:
        yield told


class OwnAccount:
    """Signs for one peer. `lost`: the transaction is sent, and the answer does not arrive."""

    def __init__(self, hall: Hall, peer: str) -> None:
        self._hall, self._peer = hall, peer
        self.num_sent, self.lost, self.away = 0, False, False

    def guess_answer(self, market: Market, *arguments: Any) -> str:
        return self._send(market.guess_answer(*arguments))

    def claim_reward(self, market: Market, game: int, peer_id: str) -> str:
        return self._send(market.claim_reward(game, peer_id))

    def _send(self, call: Any) -> str:
        if self.away:
            raise ChainUnreachable("nobody answers")
        self.num_sent += 1
        receipt = self._hall.chain.send(self._hall.accounts[self._peer], call)
        if self.lost:
            raise ChainUnreachable("the answer is lost")
        return receipt.tx_hash


class Fixed:
    """A model with these log-probabilities. `fails`: what it raises in their place."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)
        self.fails: Exception | None = None
        self.num_asked = 0

    def logprobs(self, question: str, choices: list[str], seconds: float) -> list[float]:
        self.num_asked += 1
        if self.fails is not None:
            raise self.fails
        return self.values


@contextmanager
def playing(hall: Hall, desk: Desk, tmp_path, account=None, **changes) -> Iterator[Player]:
    section = settings.Market(judge_url=desk.url, contract=hall.market.address).model_copy(
        update=changes
    )
    journal = Journal(tmp_path / "bets.db")
    player = Player(
        section,
        "anna",
        hall.market.client,
        account or OwnAccount(hall, "anna"),
        journal,
        tmp_path / "logs/prg_record.txt",
    )
    assert player._find()
    yield player
    journal.close()


def turn(player: Player, model: Fixed) -> None:
    """Let the player see the clue, think about it, and act."""
    player.step()
    player.think(lambda: model)
    player.step()


def test_bets_once_for_each_clue_and_claims(hall, desk, tmp_path):
    game, salt = hall.open(2, 2, 1)
    with playing(hall, desk, tmp_path) as player:
        for round, remaining in ((0, 2), (1, 1)):
            desk.say(game, round, remaining, "yes", "no")
            turn(player, Fixed(-3.0, -1.0))
            turn(player, Fixed(-3.0, -1.0))
            hall.send("incrementRound", game)
        assert hall.market.read("totalBets", game) == 100 * TOKEN  # a half, and then the rest
        assert player.status() == {"confirmed": 2}
        hall.send("revealAnswer", game, 1, salt)
        player.step()
        player.step()
        assert hall.market.balance("anna") == 100 * TOKEN
        status = player.status()
        assert (status["paid"], status["rated"]) == (2, 2)
        assert 0 < status["brier"] < 0.1
    lines = (tmp_path / "logs/prg_record.txt").read_text().splitlines()
    assert "Game 0 Round 0: placed bet of 50.000 on 'no'" in lines[0]
    assert "Game 0 Round 1: placed bet of 50.000 on 'no'" in lines[1]
    assert "claimed 100.000 for the game" in lines[-1]


def test_part_of_a_wrong_bet_is_claimed_back(hall, desk, tmp_path):
    game, salt = hall.open(1, 2, 0)
    hall.bet(game, "bert", 0, 0, 100 * TOKEN)
    with playing(hall, desk, tmp_path, policy="kelly", kelly_fraction=0.5) as player:
        desk.say(game, 0, 1, "yes", "no")
        turn(player, Fixed(-9.0, -0.1))
        hall.send("incrementRound", game)
        hall.send("revealAnswer", game, 0, salt)
        player.step()
        player.step()
        player.step()
        assert player.status()["paid"] == 1
        staked = hall.market.read("totalBets", game) - 100 * TOKEN
        assert 100 * TOKEN - staked < hall.market.balance("anna") < 100 * TOKEN


@pytest.mark.parametrize(("others", "bets"), [(0, False), (1, True)])
def test_kelly_bets_only_where_there_is_something_to_win(hall, desk, tmp_path, others, bets):
    """Nodes that agree get at most their stakes back."""
    game, _ = hall.open(1, 2, 0)
    for peer in ("bert", "cleo"):
        hall.bet(game, peer, 0, others, 50 * TOKEN)
    with playing(hall, desk, tmp_path, policy="kelly") as player:
        desk.say(game, 0, 1, "yes", "no")
        turn(player, Fixed(-0.1, -3.0))
        assert player.status() == ({"sent": 1} if bets else {"skipped": 1})
    found = hall.market.guess_of(game, "anna", 0, 0)
    assert found is None or 0 < found.bet <= 25 * TOKEN


def test_odds_are_what_the_contract_pays(hall, desk, tmp_path):
    game, salt = hall.open(2, 3, 1)
    for round, (choice, bet) in enumerate(((1, 20 * TOKEN), (2, 30 * TOKEN))):
        hall.bet(game, "anna", round, choice, bet)
        hall.bet(game, "bert", round, round, 50 * TOKEN)
        hall.send("incrementRound", game)
    with playing(hall, desk, tmp_path) as player:
        rows = [
            Row(
                hall.market.address, game, round, 0, 0, amount * TOKEN, (0.3,) * 3, "confirmed", 1.0
            )
            for round, amount in enumerate((20, 30))
        ]
        for row in rows:
            player.journal.add(row)
        odds = player._odds(hall.market, rows[0])
    hall.send("revealAnswer", game, 1, salt)
    payout, _ = hall.market.payout(game, "anna")
    assert odds.payment(1, 0, 0, 0) == pytest.approx(payout, rel=1e-12)


def test_clue_of_a_market_that_does_not_tell_its_odds_is_skipped(hall, desk, tmp_path, monkeypatch):
    game, _ = hall.open(1, 2, 0)
    desk.say(game, 0, 1, "yes", "no")

    def refuse(*_: object) -> int:
        raise ContractRefused("", "reverted")

    monkeypatch.setattr(Market, "balance", refuse)
    with playing(hall, desk, tmp_path) as player:
        turn(player, Fixed(-1.0, -2.0))
        assert player.status() == {"skipped": 1}
    record = (tmp_path / "logs/prg_record.txt").read_text()
    assert "no bet: the contract does not tell what a bet would pay: reverted" in record


@pytest.mark.parametrize("dies", ["before it is sent", "after it is sent"])
def test_killed_player_bets_exactly_once(hall, desk, tmp_path, dies):
    game, _ = hall.open(1, 2, 0)
    desk.say(game, 0, 1, "yes", "no")
    account = OwnAccount(hall, "anna")
    account.lost, account.away = dies == "after it is sent", dies == "before it is sent"
    with playing(hall, desk, tmp_path, account) as player:
        player.step()
        player.think(lambda: Fixed(-1.0, -2.0))
        with pytest.raises(ChainUnreachable):
            player.step()
    with playing(hall, desk, tmp_path, account) as again:
        account.lost = account.away = False
        (row,) = again.journal.open_rows(hall.market.address)
        if dies == "before it is sent":
            assert hall.market.guess_of(game, "anna", 0, 0) is None
            again.journal._database.execute("UPDATE bets SET changed_at = 0")
        again.step()
        again.step()
        assert (row.choice, row.amount) == (0, 100 * TOKEN)
        assert hall.market.guess_of(game, "anna", 0, 0).bet == 100 * TOKEN
        assert again.status() == {"confirmed": 1}
    assert account.num_sent == 1


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"<html>", BadAnswer),
        (b'{"game_id": "1", "clue_id": 0}', BadAnswer),
        (b'{"game_id": 1, "clue_id": 0, "rounds_remaining": 1e99}', BadAnswer),
        (b'{"game_id": 1, "clue_id": 0, "choices": ["a", 7]}', BadAnswer),
        (b"[" * 100_000, BadAnswer),
        (b"x" * 300_000, BadAnswer),
    ],
)
def test_nonsense_of_a_judge_is_one_error(hall, desk, tmp_path, body, error):
    desk.body = body
    with playing(hall, desk, tmp_path) as player, pytest.raises(error, match="expected a clue"):
        player.step()
    assert not (tmp_path / "logs").exists()


def test_judge_that_is_away_costs_nothing(desk):
    desk.status = 503
    with pytest.raises(ChainUnreachable, match="HTTP 503"):
        JudgeClient(desk.url).clue()
    with pytest.raises(ChainUnreachable, match="no answer"):
        JudgeClient("http://127.0.0.1:1").clue()


@pytest.mark.parametrize(
    "tell",
    [
        lambda desk: desk.say(99, 0, 1, "yes", "no"),  # no such game
        lambda desk: desk.say(0, 1, 1, "yes", "no"),  # not the round of the contract
        lambda desk: desk.say(0, 0, 1, "yes", "no", "more"),  # choices that the game lacks
        lambda desk: desk.say(-1, -1, -1),
    ],
)
def test_clue_that_the_contract_does_not_know_is_not_thought_about(
    hall, desk, tmp_path, tell: Callable[[Desk], None]
):
    hall.open(2, 2, 0)
    tell(desk)
    model = Fixed(-1.0, -2.0)
    with playing(hall, desk, tmp_path) as player:
        turn(player, model)
    assert (model.num_asked, hall.market.balance("anna")) == (0, 100 * TOKEN)


def test_clue_that_the_model_can_not_score_is_skipped_with_the_reason(hall, desk, tmp_path):
    game, _ = hall.open(1, 2, 0)
    desk.say(game, 0, 1, "yes", "no")
    slow = Fixed()
    slow.fails = NotScored("the model would need 99 s")
    with playing(hall, desk, tmp_path) as player:
        turn(player, slow)
        turn(player, slow)
        assert player.status() == {"skipped": 1}
    assert slow.num_asked == 1
    assert "no bet: the model would need 99 s" in (tmp_path / "logs/prg_record.txt").read_text()


def test_clue_whose_pass_ended_the_worker_is_not_asked_about_again(hall, desk, tmp_path):
    """The kernel may end it for its memory: without a row, each restart would do so again."""
    game, _ = hall.open(2, 2, 0)
    desk.say(game, 0, 2, "yes", "no")
    model = Fixed(-1.0, -2.0)
    model.fails = KeyError("a fault of the model")
    with playing(hall, desk, tmp_path) as player:
        player.step()
        with pytest.raises(KeyError):
            player.think(lambda: model)
    model.fails = None
    with playing(hall, desk, tmp_path) as again:
        turn(again, model)
        assert (model.num_asked, again.status()) == (1, {"skipped": 1})
        hall.send("incrementRound", game)
        desk.say(game, 1, 1, "yes", "no")
        turn(again, model)
        assert again.status() == {"skipped": 1, "sent": 1}


def test_foreign_market_gets_no_second_bet(hall, desk, tmp_path, monkeypatch):
    """It may take two bets for a clue, so one whose fate is not known is not sent again."""
    monkeypatch.setattr(Market, "version", None)
    game, salt = hall.open(1, 2, 0)
    desk.say(game, 0, 1, "yes", "no")
    account = OwnAccount(hall, "anna")
    account.away = True
    with playing(hall, desk, tmp_path, account) as player:
        player.step()
        player.think(lambda: Fixed(-1.0, -2.0))
        with pytest.raises(ChainUnreachable):
            player.step()
        account.away = False
        player.journal._database.execute("UPDATE bets SET changed_at = 0")
        player.step()
        hall.send("incrementRound", game)
        player.step()
        assert (player.status(), account.num_sent) == ({"missed": 1}, 0)
    assert salt


def test_foreign_market_is_claimed_by_its_log(hall, desk, tmp_path, monkeypatch):
    monkeypatch.setattr(Market, "version", None)
    game, salt = hall.open(1, 2, 0)
    desk.say(game, 0, 1, "yes", "no")
    with playing(hall, desk, tmp_path) as player:
        turn(player, Fixed(-1.0, -2.0))
        hall.send("incrementRound", game)
        hall.send("revealAnswer", game, 0, salt)
        for _ in range(3):
            player.step()
        assert player.status()["paid"] == 1
    assert hall.market.balance("anna") >= 100 * TOKEN - 1


def test_thread_bets_by_itself(hall, desk, tmp_path):
    game, _ = hall.open(1, 2, 0)
    desk.say(game, 0, 1, "yes", "no")
    model = Fixed(-1.0, -2.0)
    with playing(hall, desk, tmp_path, poll_seconds=0.05) as player:
        player.start()
        deadline = time.monotonic() + 20
        while player.status() != {"confirmed": 1}:
            assert time.monotonic() < deadline
            player.think(lambda: model)
            time.sleep(0.02)
        player.close()
    assert model.num_asked == 1


DAY = 86_400


@pytest.mark.parametrize("lacks", ["an end of the round", "a reveal"])
def test_bet_of_a_game_whose_judge_is_gone_is_claimed_back(place, tmp_path, lacks):
    """Nobody else cancels the game: the player's claim does, after the deadline."""
    with own_chain(place) as chain, judging() as desk:
        hall = open_hall(chain)
        game, _ = hall.open(1, 2, 0)
        hall.bet(game, "bert", 0, 0, TOKEN)
        with playing(hall, desk, tmp_path) as player:
            desk.say(game, 0, 1, "yes", "no")
            turn(player, Fixed(-3.0, -1.0))
            player.step()
            if lacks == "a reveal":
                hall.send("incrementRound", game)
            desk.status = 503
            with pytest.raises(ChainUnreachable):
                player.step()
            assert (player.status(), hall.market.balance("anna")) == ({"confirmed": 1}, 0)
            skip_seconds(chain, DAY + 1)
            for _ in range(2):
                with pytest.raises(ChainUnreachable, match="HTTP 503"):
                    player.step()
            assert player.status() == {"paid": 1}
        assert hall.market.game(game).status == GameStatus.CANCELLED
        # With the grant of the new day.
        assert hall.market.balance("anna") == 200 * TOKEN
        assert hall.claim(game, "bert") == TOKEN
    lines = (tmp_path / "logs/prg_record.txt").read_text().splitlines()
    assert lines[-1].endswith("Game 0 Round 0: got back 100.000: the game was cancelled")


def test_bet_that_the_chain_lost_is_given_up_and_others_go_on(hall, desk, tmp_path):
    """A killed chain may lose its last seconds, and with them a game or a bet."""
    kept, _ = hall.open(1, 2, 0)
    with playing(hall, desk, tmp_path) as player:
        for game in (kept, 7):
            row = Row(hall.market.address, game, 0, 0, 0, TOKEN, (), "confirmed", 1.0)
            player.journal.add(row)
        game, _ = hall.open(1, 2, 0)
        desk.say(game, 0, 1, "yes", "no")
        turn(player, Fixed(-1.0, -2.0))
        player.step()
        assert player.status() == {"sent": 1, "missed": 1, "confirmed": 1}
        hall.send("incrementRound", kept)
        player.step()
        assert player.status() == {"missed": 2, "confirmed": 1}
    record = (tmp_path / "logs/prg_record.txt").read_text()
    assert "the chain was restored from before the game" in record


def test_game_whose_number_a_restored_chain_gives_again_is_another_game(hall, desk, tmp_path):
    snapshot = ask(hall.chain, "evm_snapshot")
    game, _ = hall.open(1, 2, 0)
    with playing(hall, desk, tmp_path) as player:
        desk.say(game, 0, 1, "yes", "no")
        turn(player, Fixed(-1.0, -2.0))
        player.step()
        assert player.status() == {"confirmed": 1}
        assert ask(hall.chain, "evm_revert", snapshot)
        again, salt = hall.open(1, 2, 1)
        assert again == game
        desk.say(again, 0, 1, "left", "right")
        turn(player, Fixed(-2.0, -1.0))
        player.step()
        assert player.status() == {"missed": 1, "confirmed": 1}
        assert hall.market.guess_of(again, "anna", 0, 0).choice == 1
        hall.send("incrementRound", again)
        hall.send("revealAnswer", again, 1, salt)
        player.step()
        player.step()
        assert (player.status()["paid"], player.status()["rated"]) == (1, 1)
    assert (
        "the chain was restored from before the game"
        in (tmp_path / "logs/prg_record.txt").read_text()
    )


def test_opinion_on_a_game_that_was_replaced_meanwhile_is_not_bet(hall, desk, tmp_path):
    snapshot = ask(hall.chain, "evm_snapshot")
    game, _ = hall.open(1, 2, 0)
    with playing(hall, desk, tmp_path) as player:
        desk.say(game, 0, 1, "yes", "no")
        player.step()
        assert ask(hall.chain, "evm_revert", snapshot)
        again, _ = hall.open(1, 2, 1)
        assert again == game
        player.think(lambda: Fixed(-1.0, -2.0))
        player.step()
        assert player.status() == {"skipped": 1}
    assert hall.market.guess_of(again, "anna", 0, 0) is None


def test_refused_claim_delays_no_bet(hall, desk, tmp_path, monkeypatch):
    game, salt = hall.open(1, 2, 0)
    account = OwnAccount(hall, "anna")
    with playing(hall, desk, tmp_path, account) as player:
        desk.say(game, 0, 1, "yes", "no")
        turn(player, Fixed(-1.0, -2.0))
        hall.send("incrementRound", game)
        hall.send("revealAnswer", game, 0, salt)

        def refuse(*_: object) -> str:
            raise ContractRefused("NotPeersAccount", "another account")

        monkeypatch.setattr(account, "claim_reward", refuse)
        player.step()
        second, _ = hall.open(1, 2, 0)
        desk.say(second, 0, 1, "yes", "no")
        player.step()
        (row,) = player.journal.open_rows(hall.market.address)
        assert (row.state, row.reason) == ("claiming", "another account")
        assert player._asked is not None


def test_calibration_is_told_by_family(hall, desk, tmp_path):
    with playing(hall, desk, tmp_path) as player:
        for family, logprobs in (("bf", (-0.1, -9.0)), ("bf", (-9.0, -0.1)), (None, (0.0, 0.0))):
            game, salt = hall.open(1, 2, 0)
            desk.say(game, 0, 1, "yes", "no")
            if family is not None:
                desk.body = json.dumps(json.loads(desk.body) | {"family": family}).encode()
            turn(player, Fixed(*logprobs))
            hall.send("incrementRound", game)
            hall.send("revealAnswer", game, 0, salt)
            for _ in range(3):
                player.step()
        assert player.calibration() == {
            "bf": pytest.approx(1.0, abs=0.01),
            UNKNOWN_FAMILY: pytest.approx(0.5),
        }


def test_slow_or_huge_judge_never_delays_the_round_loop(hall, tmp_path, monkeypatch):
    """A judge that drips bytes, or sends too many, costs its own thread a few seconds at most."""
    monkeypatch.setattr(judge_client, "_SECONDS", 0.5)
    hall.open(1, 2, 0)
    with judging() as desk, playing(hall, desk, tmp_path, poll_seconds=0.05) as player:
        for body, pause in ((b"[" * 1000, 0.1), (b"x" * (40 << 20), 0.0)):
            desk.body, desk.pause_seconds = body, pause
            started = time.monotonic()
            with pytest.raises(ChainUnreachable, match="no answer"):
                player.step()
            assert time.monotonic() - started < 8
        desk.pause_seconds = 0.1
        model = Fixed(-1.0, -2.0)
        player.start()
        slowest = 0.0
        for _ in range(50):
            started = time.monotonic()
            player.think(lambda: model)
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.02)
        player.close()
        assert (model.num_asked, player.status()) == (0, {})
        assert slowest < 0.5  # microseconds, on a machine that does nothing else
