"""The market's rule in Python's whole numbers, written down apart from the contract."""

from collections import defaultdict
from math import isqrt

ONE = 10**18
OPENING = 100 * ONE
MIN_BET = ONE // 1000


def rounded_up(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


class Model:
    """One game: `bet` in its rounds, then `payouts`."""

    def __init__(self, num_choices: int) -> None:
        self.supplies = [OPENING] * num_choices
        self.highest = [self._price(0)] * num_choices
        self.pot = 0
        self.stakes: dict[str, int] = defaultdict(int)
        self.shares: dict[tuple[str, int], int] = defaultdict(int)

    def bet(self, peer: str, choice: int, bet: int) -> int:
        """Return the shares that the bet buys."""
        shares = self.shares_for(choice, bet)
        self.supplies[choice] += shares
        prices = self.highest[choice], rounded_up(bet * ONE, shares), self._price(choice)
        self.highest[choice] = max(prices)
        self.pot += bet
        self.stakes[peer] += bet
        self.shares[peer, choice] += shares
        return shares

    def shares_for(self, choice: int, bet: int) -> int:
        others = sum(supply**2 for i, supply in enumerate(self.supplies) if i != choice)
        cost = isqrt(self._sum_of_squares()) + bet
        by_cost = isqrt(cost**2 - others) - self.supplies[choice]
        return min(by_cost, bet * ONE // self.highest[choice])

    def payouts(self, right: int) -> dict[str, int]:
        return {
            peer: (self.shares[peer, right] * self.pot + stake * OPENING) // self.supplies[right]
            for peer, stake in self.stakes.items()
        }

    def _sum_of_squares(self) -> int:
        return sum(supply**2 for supply in self.supplies)

    def _price(self, choice: int) -> int:
        return rounded_up(self.supplies[choice] * ONE, isqrt(self._sum_of_squares()))
