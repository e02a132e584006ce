"""Compute the bet from the model's probabilities: choice and amount. Pure functions."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_STEPS = 16
"""Number of amounts that are compared, closer to each other where they are small."""
_LEAST_GROWTH = 1e-6
"""Smallest growth of the balance, as a share of it, for which a bet is made."""


@dataclass(frozen=True, slots=True)
class Bet:
    """A bet of `amount` units of a token on `choice`; 0: no bet."""

    choice: int
    amount: int


@dataclass(frozen=True, slots=True)
class Odds:
    """The state of a game that determines its payments, in units of tokens and shares.

    `pot`: the sum of all bets; `stake`: that of ours. `supplies` and `own`: by choice, the shares
    of all peers, and ours. `opening`: the number of shares with which each choice opened, if their
    payment is divided among all bets; 0 if nobody is paid for them.
    """

    pot: int
    stake: int
    supplies: tuple[int, ...]
    own: tuple[int, ...]
    opening: int

    def payment(self, right: int, choice: int, amount: int, shares: int) -> float:
        """Return our payment if choice `right` is right, after buying `shares` of `choice`."""
        bought = shares if right == choice else 0
        supply = self.supplies[right] + self.opening + bought
        if supply == 0:
            return 0.0
        by_shares = (self.own[right] + bought) * (self.pot + amount)
        return (by_shares + (self.stake + amount) * self.opening) / supply


def probabilities(logprobs: Sequence[float]) -> list[float]:
    """Return the probability of each choice, given that one of them is the answer.

    A log-probability that is not finite means that the model excludes the choice; if none is
    finite, all choices are equally likely.
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
    """Return an even share of the balance on the most likely choice, as RL Swarm's nodes do."""
    return Bet(likeliest(beliefs), balance // max(1, rounds_remaining))


def kelly(
    beliefs: Sequence[float],
    odds: Odds,
    offers: Iterable[tuple[int, int]],
    balance: int,
    fraction: float,
) -> Bet:
    """Return `fraction` of Kelly's bet on the most likely choice.

    Kelly's bet is the one of `offers` (amounts with the shares that they buy) with which the
    balance grows fastest if the beliefs are right and nobody bets later. There is no bet if the
    balance does not grow, as when all others bet on the same choice, so nothing can be won.
    """
    choice = likeliest(beliefs)

    def growth(amount: int, shares: int) -> float:
        left = balance - amount
        found = 0.0
        for right, belief in enumerate(beliefs):
            wealth = left + odds.payment(right, choice, amount, shares)
            if belief > 0:
                found += belief * (math.log(wealth) if wealth > 0 else -math.inf)
        return found

    best = 0
    most = growth(0, 0) + _LEAST_GROWTH
    for amount, shares in offers:
        found = growth(amount, shares)
        if found > most:
            best, most = amount, found
    # A balance has more digits than a float, so the result may be rounded up.
    return Bet(choice, min(balance, int(best * fraction)))


def amounts(balance: int) -> list[int]:
    """Return the bets to compare, from small ones to the whole balance."""
    found = [balance * step * step // _STEPS**2 for step in range(1, _STEPS + 1)]
    return [amount for amount in found if amount > 0]


def brier(
    beliefs: Sequence[float],
    right: int,
) -> float:
    """Return the Brier score: the sum of squared errors, 0 (perfect) to 2 (sure and wrong)."""
    return sum((belief - (i == right)) ** 2 for i, belief in enumerate(beliefs))


def likeliest(beliefs: Sequence[float]) -> int:
    return max(range(len(beliefs)), key=lambda i: beliefs[i])
