"""Amounts of bets."""

import math

import pytest

from worker.market.policies import Bet, brier, even, kelly, probabilities


def test_probabilities_add_up_and_survive_odd_values():
    assert probabilities([-1.0, -1.0]) == [0.5, 0.5]
    assert probabilities([-1000.0, -2000.0]) == [1.0, 0.0]
    assert probabilities([math.nan, -5.0]) == [0.0, 1.0]
    assert probabilities([-math.inf, -math.inf, math.nan]) == [1 / 3] * 3


def test_even_bets_the_balance_by_the_rounds_left():
    assert even([0.2, 0.8], 100, 3) == Bet(1, 33)
    assert even([0.9, 0.1], 100, 0) == even([0.9, 0.1], 100, -1) == Bet(0, 100)


@pytest.mark.parametrize(
    ("belief", "price", "expected"),
    [(0.75, 0.5, 25), (0.5, 0.5, 0), (0.6, 0.7, 0), (1.0, 0.5, 50), (0.9, 1.0, 0)],
)
def test_kelly_bets_a_fraction_and_only_with_an_edge(belief, price, expected):
    beliefs, prices = [belief, 1 - belief], [price, 1 - price]
    assert kelly(beliefs, prices, 100, 0.5) == Bet(0, expected)


def test_brier_is_zero_for_the_sure_and_right_and_two_for_the_sure_and_wrong():
    assert brier([1.0, 0.0], 0) == 0.0
    assert brier([1.0, 0.0], 1) == 2.0
    assert brier([0.25] * 4, 2) == pytest.approx(0.75)
