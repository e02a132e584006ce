"""Guards over scorers: answers that no scorer may see, and rewards for cheating answers."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from worker.environments.guards import GUARDS, bounded, is_refused_answer


@pytest.mark.parametrize(
    "answer",
    [
        *("nan", "NaN", " -nan ", "snan", "sNaN12", "inf", "-Infinity", "+inf", "infj", "nanj"),
        *("1e999", "1E+100", "2e-1_0_0", "1e1,0,0", "i n f", "n_a*n", "(nan)", "3+infi"),
    ],
)
def test_answer_that_is_no_finite_number_is_refused(answer: str) -> None:
    assert is_refused_answer(answer)


@pytest.mark.parametrize(
    "answer", ["", "7", "-1.5e10", "1e99", "banana", "information", "finance", "Nancy", "e100x"]
)
def test_usual_answer_is_not_refused(answer: str) -> None:
    assert is_refused_answer(answer) is (answer == "e100x")


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (0.0, 0.0),
        (0.4, 0.4),
        (1.0, 1.0),
        (1.0000001, 0.0),
        (-0.1, 0.0),
        (math.nan, 0.0),
        (math.inf, 0.0),
        (-math.inf, 0.0),
    ],
)
def test_reward_out_of_range_is_none(reward: float, expected: float) -> None:
    assert bounded(reward) == expected


def score(family: str, right: str, answer: str, theirs: float = 1.0, question: str = "?") -> float:
    """Return the guard's reward, where the family's own scorer gives `theirs`."""
    item = {"question": question, "answer": right, "metadata": {}}
    return GUARDS[family].score(item, answer, lambda: theirs)


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("0.0349", 1.0),
        ("0.03490001", 1.0),
        ("349/10000", 1.0),
        ("3.49e-2", 1.0),
        ("0.03", 0.0),
        ("0", 0.0),
        ("0.0349 or 1", 0.0),
        ("1e999999999", 0.0),
        ("9" * 10_000, 0.0),
        ("0.0349%", 0.0),
        ("٠.٠٣٤٩", 0.0),
    ],
)
def test_probability_is_compared_as_a_number(answer: str, reward: float) -> None:
    assert score("coin_flip", "0.0349", answer) == reward


@hypothesis_settings(max_examples=60, deadline=None, database=None)
@given(numerator=st.integers(0, 500), denominator=st.integers(1, 500), digits=st.integers(0, 8))
def test_rounded_probability_is_right_within_a_ten_thousandth(
    numerator: int, denominator: int, digits: int
) -> None:
    right = Fraction(numerator, denominator)
    answer = f"{float(right):.{digits}f}"
    expected = abs(Fraction(answer) - Fraction(str(float(right)))) <= Fraction(1, 10_000)
    assert score("coin_flip", str(float(right)), answer) == float(expected)


@pytest.mark.parametrize(
    "family",
    ["polynomial_equations", "prime_factorization", "rectangle_count", "string_manipulation"],
)
@pytest.mark.parametrize(("theirs", "reward"), [(1.0, 1.0), (0.99, 0.0), (0.5, 0.0), (0.0, 0.0)])
def test_partial_reward_is_none(family: str, theirs: float, reward: float) -> None:
    assert score(family, "7", "8", theirs) == reward


@pytest.mark.parametrize(("answer", "reward"), [("True", 1.0), (" True ", 1.0), ("yes", 0.0)])
def test_text_is_not_true_because_it_is_there(answer: str, reward: float) -> None:
    assert score("game_of_life_halting", "True", answer) == reward


@pytest.mark.parametrize(
    ("family", "question", "right", "is_sound"),
    [
        ("number_sequence", "3, 3, 3, ?", "3", False),
        ("number_sequence", "1, 2, 3, ?", "4", True),
        ("number_sequence", "what comes next?", "4", True),
        ("number_sequence", "1, 2, -3, ?", "-3", False),
        ("string_insertion", "insert into ABC", "ABC", False),
        ("string_insertion", "insert into 'ABC'", "ABC", False),
        ("string_insertion", "insert into ABC", "ABBC", True),
        ("string_insertion", "", "ABC", False),
        ("polynomial_equations", "x^2 + 1 = 0", "", False),
        ("polynomial_equations", "x^2 + 1 = 0", " ", False),
        ("polynomial_equations", "x - 1 = 0", "1", True),
    ],
)
def test_item_whose_answer_can_be_copied_is_not_asked(
    family: str, question: str, right: str, is_sound: bool
) -> None:
    item = {"question": question, "answer": right}
    assert GUARDS[family].is_sound(item) is is_sound
