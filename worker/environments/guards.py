"""Guards over reasoning-gym's scorers: skip useless items, give cheating answers no reward.

reasoning-gym's scorers were written for honest answers. A policy under reinforcement learning, or a
peer, gives any answer that earns a reward: a premise copied from the question, "nan", an unusual
formula. Each guard here closes such a loophole of one family. `scripts/survey_families.py` found
the loopholes by giving cheap answers to every family; `families.json` has its measurements.

A guard is part of the definition of a task: `ReasoningGym.version_of` includes it, so nodes with
and without it do not exchange groups of that family, and do not blame each other.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from worker.environments import propositional

Item = dict[str, Any]
"""One entry of a reasoning-gym data set: question, answer and metadata."""
Scorer = Callable[[], float]
"""The family's own reward for the answer."""

_HUGE_EXPONENT = re.compile(r"e[+-]?[\d_]{3,}", re.IGNORECASE)
"""Fraction("1e999999999"), as in `coin_flip`, computes a number of a billion digits."""
_NOT_FINITE = re.compile(r"(?<![a-z])(s?nan\d*|inf(inity)?)[ij]?(?![a-z])", re.IGNORECASE)
"""Comparisons with nan are false: `complex_arithmetic` accepts "nan" as an exact result."""
_IGNORED_BY_SCORERS = re.compile(r"[\s,_*]")
"""Characters that some scorers remove from an answer before they parse it as a number."""
_FRACTION = re.compile(
    r"[-+]?[0-9]{1,30}(/[0-9]{1,30}|(\.[0-9]{0,40})?(e[-+]?[0-9]{1,2})?)", re.IGNORECASE
)


@dataclass(frozen=True)
class Guard:
    """Rules for the items and rewards of one family whose own rules are too generous.

    `reason`: the loophole, in words. `is_sound` decides whether an item may be used. `score`
    replaces the family's scorer, which it gets as a function without arguments. `revision` is
    incremented with every change of either.
    """

    reason: str
    revision: int = 1
    is_sound: Callable[[Item], bool] = lambda item: True
    score: Callable[[Item, str, Scorer], float] = lambda item, answer, scorer: scorer()


def is_refused_answer(answer: str) -> bool:
    """Return whether an answer must not reach a scorer: not finite, or unbounded time to parse."""
    readings = answer, _IGNORED_BY_SCORERS.sub("", answer)
    return any(_HUGE_EXPONENT.search(text) or _NOT_FINITE.search(text) for text in readings)


def bounded(reward: float) -> float:
    """Return `reward` if it is a valid reward, else 0.

    Rewards over 1 come from formulas outside their range: `calendar_arithmetic` divides by a
    negative number if the right answer is -1, and every other number then earns e^(5 x distance).
    """
    return reward if math.isfinite(reward) and 0.0 <= reward <= 1.0 else 0.0


def _right(item: Item) -> str:
    return str(item["answer"]).strip()


def _exact(
    item: Item,
    answer: str,
    scorer: Scorer,
) -> float:
    """Give the full reward or none.

    Partial reward for a constant or a copied number teaches a model to guess.
    """
    return float(scorer() >= 1.0)


def _same_fraction(
    item: Item,
    answer: str,
    scorer: Scorer,
) -> float:
    """Compare probabilities; the tolerance is that of `coin_flip`."""
    text = answer.replace(",", "").strip()
    if not _FRACTION.fullmatch(text):
        return 0.0
    difference = Fraction(text) - Fraction(str(item["answer"]))
    return float(abs(difference) <= Fraction(1, 10_000))


def _is_not_a_copy(item: Item) -> bool:
    """Return whether the answer differs from the last word of the question."""
    words: list[str] = str(item["question"]).split()
    return bool(words) and _right(item) != words[-1].strip("'\"")


def _is_not_last_number(item: Item) -> bool:
    numbers = re.findall(r"-?\d+", str(item["question"]))
    return not numbers or _right(item) != numbers[-1]


GUARDS: dict[str, Guard] = {
    "coin_flip": Guard(
        "a common prefix of the decimals earned a reward: 0 for 0.0349",
        score=_same_fraction,
    ),
    "game_of_life_halting": Guard(
        "any text earned 1.0, because non-empty text is true in Python",
        score=lambda item, answer, scorer: float(answer.strip() == _right(item)),
    ),
    "number_sequence": Guard(
        "sequences that repeat one number: copying it earned 0.44",
        is_sound=_is_not_last_number,
    ),
    "polynomial_equations": Guard(
        "an empty answer earned 1.0 where there is no real root, and 0 by its distance to others",
        is_sound=lambda item: _right(item) != "",
        score=_exact,
    ),
    "prime_factorization": Guard(
        "the number itself earned 0.5, as a product of one factor",
        score=_exact,
    ),
    "propositional_logic": Guard(
        "anything follows from contradicting premises, a copied premise follows from itself, and a"
        " variable alone earned 0.4",
        revision=2,
        is_sound=propositional.is_sound,
        score=lambda item, answer, scorer: propositional.score(item, answer),
    ),
    "rectangle_count": Guard(
        "2 earned 0.33 by its distance to the count",
        score=_exact,
    ),
    "string_insertion": Guard(
        "in 19 of 20 items nothing is inserted: copying the text earned 0.93",
        is_sound=_is_not_a_copy,
    ),
    "string_manipulation": Guard(
        "in one of three items no rule applies, and a rule may only shorten the text: copying it"
        " earned 0.35",
        is_sound=_is_not_a_copy,
        score=_exact,
    ),
    "word_sorting": Guard(
        "the words in the order of the question earned 0.27, for words that happen to be in their"
        " place",
        score=_exact,
    ),
}
