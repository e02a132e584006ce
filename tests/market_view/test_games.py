"""Prices, results and the chart of games, from plain data."""

import itertools

import pytest

from worker.market_view import price_chart
from worker.market_view.games import Bet, Game, standings


def game_of(*bets: Bet, **changes: object) -> Game:
    game = Game(3, 2, 2, 1000.0, bets=list(bets))
    for name, value in changes.items():
        setattr(game, name, value)
    return game


# The example of docs/prediction-market.md.
ANNA = Bet("anna", 0, 0, 20.0, 26.72, 1010.0)
BERT = Bet("bert", 0, 1, 50.0, 69.24, 1020.0)
CLEO = Bet("cleo", 1, 0, 20.0, 25.48, 1070.0)


def test_prices_follow_from_the_shares_as_in_the_documented_example() -> None:
    points = game_of(CLEO, ANNA, BERT).beliefs()
    assert [at for at, _ in points] == [1000.0, 1010.0, 1020.0, 1070.0]
    first = [beliefs[0] for _, beliefs in points]
    assert first == pytest.approx([0.5, 0.616, 0.359, 0.447], abs=5e-4)
    assert all(sum(beliefs) == pytest.approx(1) for _, beliefs in points)


def test_prices_are_unknown_without_all_shares() -> None:
    assert game_of(ANNA, Bet("x", 0, 0, 1.0, None, 1011.0)).beliefs() == []
    assert game_of(ANNA, num_omitted=1).beliefs() == []
    assert price_chart.draw(game_of(ANNA, num_omitted=1), 2000.0) is None


@pytest.mark.parametrize(
    ("changes", "results"),
    [
        ({}, ["open", "open"]),
        ({"state": "closed"}, ["open", "open"]),
        ({"state": "settled", "right_choice": 0}, ["won", "lost"]),
        ({"state": "settled", "right_choice": 0, "returned": 0.0}, ["won", "lost"]),
        ({"state": "settled", "right_choice": 0, "returned": 0.657}, ["won", "lost 34 %"]),
        ({"state": "cancelled"}, ["refund due", "refund due"]),
        ({"state": "cancelled", "paid": {"bert": 50.0}}, ["refund due", "refunded"]),
    ],
)
def test_result_of_a_bet(changes: dict[str, object], results: list[str]) -> None:
    game = game_of(ANNA, BERT, **changes)
    assert [game.result_of(bet) for bet in game.bets] == results


def test_stakes_come_back_when_nobody_was_right() -> None:
    game = game_of(ANNA, state="settled", right_choice=1)
    assert game.result_of(ANNA) == "refund due"
    game.paid["anna"] = 20.0
    assert game.result_of(ANNA) == "refunded"


def test_standings_add_up_over_games() -> None:
    games = [game_of(ANNA, BERT, paid={"anna": 70.0}), game_of(CLEO, ANNA)]
    rows = [(row.peer_id, row.num_bets, row.staked, row.paid) for row in standings(games)]
    assert rows == [("anna", 2, 40.0, 70.0), ("bert", 1, 50.0, 0.0), ("cleo", 1, 20.0, 0.0)]


def test_chart_has_a_line_per_choice_within_its_frame() -> None:
    game = game_of(ANNA, BERT, CLEO, state="settled", right_choice=0, round_ends=[1060.0, 1120.0])
    drawn = price_chart.draw(game, 5000.0)
    assert drawn is not None
    assert [line.is_right for line in drawn.lines] == [True, False]
    assert [text for _, text in drawn.x_marks] == ["round 0", "round 1"]
    for line in drawn.lines:
        corners = [tuple(map(float, corner.split(","))) for corner in line.points.split()]
        assert corners[0][0] == drawn.left
        assert corners[-1][0] == drawn.right  # up to the last round's end, not to now
        assert all(drawn.top <= y <= drawn.bottom for _, y in corners)
        # Steps: a price changes at a bet, and never in between.
        for (x, y), (next_x, next_y) in itertools.pairwise(corners):
            assert x == next_x or y == next_y
    assert "choice 1 45%" in drawn.description


def test_chart_of_a_game_that_was_just_opened() -> None:
    drawn = price_chart.draw(game_of(), 1000.0)
    assert drawn is not None
    assert [line.probability for line in drawn.lines] == [0.5, 0.5]
