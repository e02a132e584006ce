"""Amounts of bets."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


FINITE = st.floats(-1e6, 0.0) | st.sampled_from([math.nan, math.inf, -math.inf])
BALANCES = st.integers(0, 2**128) | st.sampled_from([0, 1, 10**18, 2**60 + 2**7 + 1])


@given(st.lists(FINITE, min_size=1, max_size=64))
def test_probabilities_of_anything_are_probabilities(logprobs):
    found = probabilities(logprobs)
    assert len(found) == len(logprobs)
    assert math.fsum(found) == pytest.approx(1.0)
    assert all(0 <= value <= 1 for value in found)
    finite = [value for value in logprobs if math.isfinite(value)]
    if finite:
        assert logprobs[found.index(max(found))] == pytest.approx(max(finite), rel=1e-12)


@given(
    st.lists(FINITE, min_size=2, max_size=8),
    st.lists(st.floats(0, 1), min_size=8, max_size=8),
    BALANCES,
    st.floats(0, 1, exclude_min=True),
)
def test_bet_is_never_more_than_the_balance(logprobs, prices, balance, fraction):
    beliefs = probabilities(logprobs)
    bet = kelly(beliefs, prices, balance, fraction)
    assert 0 <= bet.amount <= balance
    assert beliefs[bet.choice] == max(beliefs)
    assert bet.amount == 0 or beliefs[bet.choice] > prices[bet.choice]


@pytest.mark.parametrize("balance", [2**60 + 2**7 + 1, 10**18 + 65, 10**30 + 1])
def test_certain_model_bets_everything_and_not_a_unit_more(balance):
    assert balance >= kelly([1.0, 0.0], [0.0, 1.0], balance, 1.0).amount > balance * 0.999


@given(BALANCES, st.integers(-5, 200))
def test_even_shares_of_all_rounds_are_the_balance(balance, rounds):
    left = balance
    for remaining in range(rounds, 0, -1):
        left -= even([1.0], left, remaining).amount
    assert left == (0 if rounds > 0 else balance)


@given(st.lists(FINITE, min_size=2, max_size=8), st.data())
def test_brier_score_is_between_perfect_and_sure_and_wrong(logprobs, data):
    beliefs = probabilities(logprobs)
    right = data.draw(st.integers(0, len(beliefs) - 1))
    assert -1e-9 <= brier(beliefs, right) <= 2 + 1e-9


def test_of_equal_choices_the_first_is_bet_on():
    assert even([0.25] * 4, 100, 1) == Bet(0, 100)
    assert kelly([0.4, 0.4, 0.2], [0.5, 0.1, 0.1], 100, 1.0).amount == 0
