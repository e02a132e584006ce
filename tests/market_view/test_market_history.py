"""The market read from a chain: each event once, whatever fails or is reset, and within limits."""

import json

import pytest

from tests.chain.desk import Desk, judging
from tests.market_view.market_stand_in import CONTRACT, Chain
from worker import settings
from worker.chain.market import TOKEN, Game, GameStatus
from worker.market_view import market_history
from worker.market_view.market_history import MAX_GAMES, History, View


@pytest.fixture
def chain(monkeypatch) -> Chain:
    monkeypatch.setattr(market_history, "Market", lambda coordinator, _: coordinator)
    return Chain()


@pytest.fixture
def desk(monkeypatch):
    monkeypatch.setattr(market_history, "_JUDGE_SECONDS", 0.0)
    with judging() as told:
        yield told


def history_of(chain: Chain, **market: object) -> History:
    section = settings.Market.model_validate(market)
    return History(settings.Settings(market=section), lambda: chain)


def seen(history: History) -> View:
    history.look()
    return history.view()


def test_game_is_read_from_its_events(chain):
    chain.opens(0)
    chain.shares = {"anna": 27 * TOKEN, "bert": 69 * TOKEN}
    chain.bets(0, "anna", 0, 20)
    chain.happens("RoundIncremented", 0)
    chain.bets(0, "bert", 1, 50, round=1)
    chain.happens("RoundIncremented", 0)
    chain.happens("AnswerRevealed", 0, correctChoiceIdx=1)
    chain.happens("RewardClaimed", 0, peerId="bert", betTokensOut=70 * TOKEN)
    chain.balances = {"bert": 90 * TOKEN}
    chain.payouts = {"anna": 5 * TOKEN}
    view = seen(history_of(chain))
    (game,) = view.games
    assert (game.state, game.right_choice, game.opened_at, game.ended_at) == (
        ("settled", 1, 1010.0, 1060.0)
    )
    assert game.round_ends == [1030.0, 1050.0]
    bets = [(bet.peer_id, bet.round, bet.choice, bet.amount, bet.shares) for bet in game.bets]
    assert bets == [("anna", 0, 0, 20.0, 27.0), ("bert", 1, 1, 50.0, 69.0)]
    assert [(row.peer_id, row.paid, row.balance) for row in view.standings] == [
        ("bert", 70.0, 90.0),
        ("anna", 0.0, 0.0),
    ]
    assert (view.contract, view.error) == (CONTRACT, None)
    assert [game.result_of(bet) for bet in game.bets] == ["lost 75 %", "won"]


def test_each_event_counts_once_however_often_it_is_looked_at(chain):
    history = history_of(chain)
    chain.opens(0)
    for number in range(4):
        chain.bets(0, f"peer-{number}")
        seen(history)
        view = seen(history)
        assert [bet.peer_id for bet in view.games[0].bets] == [
            f"peer-{n}" for n in range(number + 1)
        ]


@pytest.mark.parametrize("fail_at", ["check", "block_number", "block_time", "game", "balance of a"])
def test_error_at_any_request_costs_nothing_and_repeats_nothing(chain, fail_at, caplog):
    history = history_of(chain)
    chain.opens(0)
    seen(history)
    chain.bets(0, "a")
    chain.fail_at = fail_at
    for _ in range(3):
        view = seen(history)
        assert "no answer of" in view.error
        assert view.error.isprintable()
        assert "secret-word" not in view.error
        assert len(view.games) == 1
    assert caplog.text.count("can't be read") == 1
    chain.fail_at = None
    view = seen(history)
    assert view.error is None
    assert [bet.peer_id for bet in view.games[0].bets] == ["a"]


def test_error_within_a_piece_repeats_that_piece_alone(chain, monkeypatch):
    monkeypatch.setattr(market_history, "_PIECE_BLOCKS", 2)
    chain.opens(0)
    for number in range(5):
        chain.bets(0, f"p{number}")
    history = history_of(chain)
    chain.fail_at = "NewGuess 4-5"
    assert "no answer" in seen(history).error
    chain.fail_at, chain.asked = None, []
    view = seen(history)
    assert [bet.peer_id for bet in view.games[0].bets] == [f"p{n}" for n in range(5)]
    assert [name for name in chain.asked if name.startswith("NewGuess")] == [
        "NewGuess 4-5",
        "NewGuess 6-6",
    ]


@pytest.mark.parametrize("change", ["shorter", "another", "contract"])
def test_chain_that_was_reset_is_read_again_from_its_start(chain, change):
    history = history_of(chain)
    chain.opens(0)
    chain.bets(0, "a")
    chain.bets(0, "b")
    assert len(seen(history).games[0].bets) == 2
    chain.log, chain.states = [], {}
    chain.num_blocks = 1
    chain.opens(7)
    if change == "another":
        chain.name, chain.num_blocks = "second", 9
    if change == "contract":
        chain.num_blocks = 9
        chain.address = "0x" + "B" * 40
        chain.deployment.market = chain.address
    view = seen(history)
    assert [(game.number, game.bets) for game in view.games] == [(7, [])]
    assert view.contract == chain.address


def test_newest_games_are_kept_newest_first(chain):
    for number in range(MAX_GAMES + 5):
        chain.opens(number)
    numbers = [game.number for game in seen(history_of(chain)).games]
    assert numbers == list(range(MAX_GAMES + 4, 4, -1))


def test_log_is_read_from_the_oldest_game_that_is_kept(chain):
    for number in range(MAX_GAMES + 5):
        chain.opens(number)
    seen(history_of(chain))
    asked = [name for name in chain.asked if name.startswith("NewGuess")]
    assert asked == [f"NewGuess 6-{chain.num_blocks - 1}"]


def test_bets_claims_and_rounds_of_anybody_are_bounded(chain, monkeypatch):
    for name in ("MAX_BETS", "MAX_ROUNDS"):
        monkeypatch.setattr(market_history, name, 3)
    chain.version = None
    chain.opens(0, num_rounds=2**200)
    for number in range(9):
        chain.bets(0, f"p{number}")
        chain.happens("RoundIncremented", 0)
        chain.happens("RewardClaimed", 0, peerId=f"p{number}", betTokensOut=TOKEN)
    chain.happens("RewardClaimed", 0, peerId="p0", betTokensOut=5 * TOKEN)
    view = seen(history_of(chain))
    (game,) = view.games
    assert (len(game.bets), game.num_omitted, len(game.round_ends)) == (3, 6, 3)
    assert game.paid == {"p0": 5.0, "p1": 1.0, "p2": 1.0}
    assert game.state == "open"
    assert len([name for name in chain.asked if name.startswith("balance")]) == 3


def test_rounds_beyond_those_of_the_game_are_no_ends(chain):
    chain.opens(0, num_rounds=2)
    for _ in range(5):
        chain.happens("RoundIncremented", 0)
    chain.states[0] = Game(GameStatus.CLOSED, 2, 2, 0, 0)
    (game,) = seen(history_of(chain)).games
    assert (len(game.round_ends), game.state) == (2, "closed")


@pytest.mark.parametrize("num_choices", [0, 1, 65, 2**255])
def test_game_without_sensible_choices_is_left_out(chain, num_choices):
    chain.opens(0, num_choices=num_choices)
    chain.bets(0, "a")
    assert seen(history_of(chain)).games == []


def test_events_that_fit_no_game_are_left_out(chain):
    chain.version = None
    chain.opens(0)
    chain.bets(9, "a")
    chain.bets(0, "a", choice=2)
    chain.bets(0, "x" * 513)
    chain.happens("AnswerRevealed", 0, correctChoiceIdx=2)
    (game,) = seen(history_of(chain)).games
    assert (game.bets, game.right_choice, game.state) == ([], None, "settled")


def test_game_whose_judge_is_gone_is_cancelled_without_an_event(chain):
    chain.opens(0)
    history = history_of(chain)
    seen(history)
    chain.states[0] = Game(GameStatus.CANCELLED, 0, 2, 0, 2000)
    (game,) = seen(history).games
    assert (game.state, game.ended_at) == ("cancelled", 2000.0)
    chain.asked = []
    seen(history)
    assert "game" not in chain.asked


def test_foreign_contract_has_no_shares_and_no_states(chain):
    chain.version = None
    chain.opens(0)
    chain.shares = {"a": TOKEN}
    chain.bets(0, "a")
    (game,) = seen(history_of(chain)).games
    assert (game.bets[0].shares, game.beliefs()) == (None, [])
    assert "game" not in chain.asked


def test_view_does_not_change_with_later_reading(chain):
    history = history_of(chain)
    chain.opens(0)
    before = seen(history)
    chain.bets(0, "a")
    chain.happens("RoundIncremented", 0)
    seen(history)
    assert (before.games[0].bets, before.games[0].round_ends) == ([], [])


def test_young_view_is_not_read_again(chain):
    history = history_of(chain)
    seen(history)
    chain.asked = []
    history.look(max_age=3600.0)
    assert chain.asked == []
    history.look()
    assert chain.asked


def test_market_that_is_off_or_not_there_is_not_read(chain):
    for history in (history_of(chain, enabled=False), history_of(Chain())):
        chain.deployment.market = None
        history._coordinator = lambda: chain
        view = seen(history)
        assert (view.contract, view.games, view.error) == (None, [], None)
        assert history.balances_of(["a"]) == {}
    assert not any(name.startswith("NewGame") for name in chain.asked)


def test_balances_are_read_for_those_that_are_asked_for(chain):
    chain.balances = {"a": 3 * TOKEN}
    assert history_of(chain).balances_of(["a", "b"]) == {"a": 3.0, "b": 0.0}


# ---- the judge


def telling(desk: Desk, chain: Chain) -> History:
    return history_of(chain, judge_url=desk.url)


def test_words_come_from_the_judge_while_a_game_is_open_and_after_it(chain, desk):
    chain.opens(3)
    desk.say(3, 0, 2, "cat", "dog")
    history = telling(desk, chain)
    (game,) = seen(history).games
    assert (game.question, game.choices, game.is_whole) == ("which?", ("cat", "dog"), False)
    chain.happens("AnswerRevealed", 3, correctChoiceIdx=0)
    past = {"game": 3, "clues": ["wh", "which one?"], "choices": ["cat", "dog"], "family": "pets"}
    desk.past = json.dumps({"games": [past]}).encode()
    view = seen(history)
    assert (view.games[0].question, view.games[0].is_whole) == ("which one?", True)
    assert (view.games[0].family, view.judge_error) == ("pets", None)
    assert view.judge_at is not None
    asked = len(desk.paths)
    seen(history)
    assert len(desk.paths) == asked  # all words are known


def test_words_that_do_not_fit_the_game_are_left_out(chain, desk):
    chain.opens(3, num_choices=3)
    history = telling(desk, chain)
    for number, choices in ((3, ("cat", "dog")), (4, ("a", "b", "c"))):
        desk.say(number, 0, 2, *choices)
        (game,) = seen(history).games
        assert (game.question, game.choices) == ("", ())


@pytest.mark.parametrize("body", [b"", b"\x1b[2J", b'{"game_id": "\\u001b"}'])
def test_judge_that_talks_nonsense_is_an_error_next_to_the_games(chain, desk, body):
    chain.opens(3)
    desk.body = body
    view = seen(telling(desk, chain))
    assert "expected a clue" in view.judge_error
    assert view.judge_error.isprintable()
    assert len(view.judge_error) <= 256
    assert (len(view.games), view.error, view.judge_at) == (1, None, None)


def test_judge_is_asked_now_and_then_only(chain, desk, monkeypatch):
    monkeypatch.setattr(market_history, "_JUDGE_SECONDS", 3600.0)
    chain.opens(3)
    desk.say(3, 0, 2, "cat", "dog")
    history = telling(desk, chain)
    for _ in range(3):
        seen(history)
    assert desk.paths == ["/current_clue/"]


def test_swarm_without_a_judge_says_so(chain):
    assert seen(history_of(chain)).judge_error == "market.judge_url is not set"
