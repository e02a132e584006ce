"""How much to bet on which choice, from the model's probabilities. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bet:
    """A bet of `amount` units of a token on `choice`; 0: no bet."""

    choice: int
    amount: int


def probabilities(logprobs: Sequence[float]) -> list[float]:
    """Return the probability of each choice, given that one of them is the answer.

    Log-probabilities that are not finite are of a choice that the model excludes; if all are, the
    choices are equally likely.
    """
    finite = [value if math.isfinite(value) else -math.inf for value in logprobs]
    highest = max(finite)
    if highest == -math.inf:
        return [1 / len(finite)] * len(finite)
    weights = [math.exp(value - highest) for value in finite]
    return [weight / sum(weights) for weight in weights]


def even(
    beliefs: Sequence[float],
    balance: int,
    rounds_remaining: int,
) -> Bet:
    """Return an even share of the balance on the likeliest choice, as existing nodes do."""
    return Bet(_likeliest(beliefs), balance // max(1, rounds_remaining))


def kelly(
    beliefs: Sequence[float],
    prices: Sequence[float],
    balance: int,
    fraction: float,
) -> Bet:
    """Return `fraction` of Kelly's bet on the likeliest choice.

    `prices`: the market's probability of each choice. A share that pays 1/price if it wins lets the
    balance grow fastest with (belief - price) / (1 - price) of it. There is no bet on a choice that
    costs more than the model believes it is worth.
    """
    choice = _likeliest(beliefs)
    belief, price = beliefs[choice], prices[choice]
    if belief <= price or price >= 1:
        return Bet(choice, 0)
    amount = int(balance * fraction * (belief - price) / (1 - price))
    # A balance has more digits than a float, which may be rounded up.
    return Bet(choice, min(balance, amount))


def brier(
    beliefs: Sequence[float],
    right: int,
) -> float:
    """Return the Brier score: the sum of squared errors, 0 (perfect) to 2 (sure and wrong)."""
    return sum((belief - (i == right)) ** 2 for i, belief in enumerate(beliefs))


def _likeliest(beliefs: Sequence[float]) -> int:
    return max(range(len(beliefs)), key=lambda i: beliefs[i])
