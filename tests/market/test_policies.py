"""Amounts of bets."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.chain.market import TOKEN
from worker.market.policies import (
    Bet,
    Odds,
    amounts,
    brier,
    even,
    kelly,
    likeliest,
    probabilities,
)


def test_probabilities_add_up_and_survive_odd_values():
    assert probabilities([-1.0, -1.0]) == [0.5, 0.5]
    assert probabilities([-1000.0, -2000.0]) == [1.0, 0.0]
    assert probabilities([math.nan, -5.0]) == [0.0, 1.0]
    assert probabilities([-math.inf, -math.inf, math.nan]) == [1 / 3] * 3


def test_even_bets_the_balance_by_the_rounds_left():
    assert even([0.2, 0.8], 100, 3) == Bet(1, 33)
    assert even([0.9, 0.1], 100, 0) == even([0.9, 0.1], 100, -1) == Bet(0, 100)


OPENING = 100 * TOKEN
NO_BETS = Odds(0, 0, (0, 0), (0, 0), OPENING)


def bought_at(price: float, balance: int = 100 * TOKEN) -> list[tuple[int, int]]:
    """Return what a market offers in which a share costs `price` tokens, whatever is bought."""
    return [(amount, int(amount / price)) for amount in amounts(balance)]


def kelly_bet(belief: float, odds: Odds, fraction: float = 1.0, price: float = 0.8) -> float:
    """Return the bet on choice 0 of a balance of 100 tokens, in tokens."""
    bet = kelly([belief, 1 - belief], odds, bought_at(price), 100 * TOKEN, fraction)
    return bet.amount / TOKEN


@pytest.mark.parametrize("belief", [0.51, 0.9, 1.0])
def test_kelly_does_not_bet_where_others_have_nothing_to_lose(belief):
    """The first bet of a game gets itself back, whatever is right."""
    assert kelly_bet(belief, NO_BETS) == 0


@pytest.mark.parametrize("num_others", [1, 2, 10])
def test_kelly_does_not_bet_with_all_others_on_the_same_choice(num_others):
    """They get at most their stakes back, and the last one pays the highest price."""
    odds = Odds(num_others * 50 * TOKEN, 0, (num_others * 60 * TOKEN, 0), (0, 0), OPENING)
    assert kelly_bet(1.0, odds, price=0.9) == 0


def test_kelly_bets_against_others_the_more_the_surer_it_is():
    against = Odds(200 * TOKEN, 0, (0, 260 * TOKEN), (0, 0), OPENING)
    found = [kelly_bet(belief, against) for belief in (0.51, 0.6, 0.8, 0.95)]
    assert found == sorted(found)
    assert 0 < found[0] < found[-1] <= 100
    assert kelly_bet(0.8, against, 0.25) == pytest.approx(found[2] / 4)


def test_kelly_knows_what_it_has_bet_before():
    """All that others bet on the wrong choice is ours already."""
    mine = Odds(101 * TOKEN, 100 * TOKEN, (10**6 * TOKEN, TOKEN), (10**6 * TOKEN, 0), OPENING)
    assert kelly_bet(0.9, mine) == 0


@pytest.mark.parametrize(("belief", "bets"), [(0.4, False), (0.6, True)])
def test_kelly_bets_in_a_plain_pari_mutuel_with_an_edge(belief, bets):
    """A share costs a token, and half of the pot is on each choice: the probability is a half."""
    plain = Odds(2000 * TOKEN, 0, (1000 * TOKEN, 1000 * TOKEN), (0, 0), 0)
    choices = [belief, 0.35, 0.65 - belief] if belief < 0.5 else [belief, 1 - belief]
    if belief < 0.5:
        plain = Odds(2000 * TOKEN, 0, (1000 * TOKEN, 500 * TOKEN, 500 * TOKEN), (0, 0, 0), 0)
    bet = kelly(choices, plain, bought_at(1.0), 100 * TOKEN, 1.0)
    assert (bet.amount > 0) == bets
    # Kelly's own rule, at odds that the bet itself hardly changes: 0.6 - 0.4 of the balance.
    assert not bets or bet.amount / TOKEN == pytest.approx(20, abs=5)


def test_payment_is_that_of_the_contract():
    """The example in docs/prediction-market.md, before and after Cleo's bet."""
    shares = [int(each * TOKEN) for each in (26.7166, 69.2388, 25.4766)]
    before = Odds(70 * TOKEN, 0, (shares[0], shares[1]), (0, 0), OPENING)
    assert before.payment(0, 0, 20 * TOKEN, shares[2]) / TOKEN == pytest.approx(28.21, abs=0.01)
    anna = Odds(90 * TOKEN, 20 * TOKEN, (shares[0] + shares[2], 0), (shares[0], 0), OPENING)
    assert anna.payment(0, 0, 0, 0) / TOKEN == pytest.approx(28.94, abs=0.01)
    bert = Odds(90 * TOKEN, 50 * TOKEN, (shares[0] + shares[2], shares[1]), (0, shares[1]), OPENING)
    assert bert.payment(0, 0, 0, 0) / TOKEN == pytest.approx(32.85, abs=0.01)


def test_choice_without_any_shares_pays_nothing():
    assert Odds(9, 9, (0, 3), (0, 3), 0).payment(0, 1, 5, 5) == 0.0


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


UNITS = st.integers(0, 2**90)


@given(
    st.lists(FINITE, min_size=2, max_size=8),
    st.lists(st.tuples(UNITS, UNITS), min_size=8, max_size=8),
    BALANCES,
    st.floats(0, 1, exclude_min=True),
    st.sampled_from([0, OPENING]),
)
def test_bet_is_never_more_than_the_balance(logprobs, shares, balance, fraction, opening):
    beliefs = probabilities(logprobs)
    own = tuple(mine for mine, _ in shares)
    odds = Odds(2**91, 2**80, tuple(sum(each) for each in shares), own, opening)
    offers = [(amount, 2 * amount) for amount in amounts(balance)]
    bet = kelly(beliefs, odds, offers, balance, fraction)
    assert 0 <= bet.amount <= balance
    assert beliefs[bet.choice] == max(beliefs)


@given(BALANCES)
def test_bets_to_compare_are_up_to_the_balance(balance):
    found = amounts(balance)
    assert found == sorted(found)
    assert len(found) <= 16
    assert not found or (found[0] > 0 and found[-1] == balance)
    assert found or balance == 0


@pytest.mark.parametrize("balance", [2**60 + 2**7 + 1, 10**18 + 65, 10**30 + 1])
def test_bet_of_everything_is_not_a_unit_more(balance):
    """A balance has more digits than a float."""
    against = Odds(100 * balance, 0, (100 * balance, 100 * balance), (0, 0), 0)
    bet = kelly([1.0, 0.0], against, [(balance, 10 * balance)], balance, 1.0)
    assert balance >= bet.amount > balance * 0.999


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
    assert likeliest([0.4, 0.4, 0.2]) == 0
