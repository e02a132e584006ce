"""Games of a prediction market with their bets, and figures computed from them. Plain data."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

GameState = Literal["open", "closed", "settled", "cancelled"]
OPENING = 100.0
"""Number of shares of each choice with which a game of our contract opens."""


@dataclass(slots=True)
class Bet:
    """A bet: `amount` in tokens, `shares` (None: unknown), `at` in Unix time."""

    peer_id: str
    round: int
    choice: int
    amount: float
    shares: float | None
    at: float


@dataclass(slots=True)
class Game:
    """A game. `round_ends` and `ended_at` are Unix times; None: it has not ended, as far as known.

    `paid`: tokens claimed, by peer. `returned`: the share of a wrong bet that is returned when the
    game is settled; None: unknown, or no bet was wrong. `family`, `question` and `choices` are the
    judge's texts; empty: unknown. `is_whole`: whether `question` has all clues. `num_omitted`:
    number of bets beyond the limit, which are not kept.
    """

    number: int
    num_rounds: int
    num_choices: int
    opened_at: float
    state: GameState = "open"
    round_ends: list[float] = field(default_factory=list)
    ended_at: float | None = None
    right_choice: int | None = None
    bets: list[Bet] = field(default_factory=list)
    num_omitted: int = 0
    paid: dict[str, float] = field(default_factory=dict)
    returned: float | None = None
    family: str = ""
    question: str = ""
    is_whole: bool = False
    choices: tuple[str, ...] = ()

    @property
    def is_over(self) -> bool:
        """Return whether only claims can follow."""
        return self.state in ("settled", "cancelled")

    @property
    def pot(self) -> float:
        """The sum of all bets, in tokens."""
        return sum(bet.amount for bet in self.bets)

    def name_of(self, choice: int) -> str:
        """Return the judge's text of a choice, or its number from 1."""
        return self.choices[choice] if self.choices else f"choice {choice + 1}"

    def beliefs(self) -> list[tuple[float, list[float]]]:
        """Return times and the market's probability of each choice from that time on.

        Empty if the shares of a bet are unknown, because then the prices are unknown too.
        """
        if any(bet.shares is None for bet in self.bets) or self.num_omitted:
            return []
        supplies = [OPENING] * self.num_choices
        points = [(self.opened_at, _shares_of_one(supplies))]
        for bet in sorted(self.bets, key=lambda bet: bet.at):
            supplies[bet.choice] += bet.shares or 0.0
            points.append((bet.at, _shares_of_one(supplies)))
        return points

    def result_of(self, bet: Bet) -> str:
        """Return the result of a bet, in a word or two."""
        refund = "refunded" if bet.peer_id in self.paid else "refund due"
        if self.state == "cancelled":
            return refund
        if self.right_choice is None:
            return "open"
        if bet.choice == self.right_choice:
            return "won"
        # If nobody bet on the right choice, everybody gets the stake back.
        is_refunded = all(other.choice != self.right_choice for other in self.bets)
        if is_refunded and not self.num_omitted:
            return refund
        return f"lost {100 * (1 - self.returned):.0f} %" if self.returned else "lost"

    def wrong_stakes(self) -> dict[str, float]:
        """Return the tokens bet by the peers that bet on wrong choices only."""
        stakes: defaultdict[str, float] = defaultdict(float)
        for bet in self.bets:
            stakes[bet.peer_id] += bet.amount
        right = {bet.peer_id for bet in self.bets if bet.choice == self.right_choice}
        return {peer_id: stake for peer_id, stake in stakes.items() if peer_id not in right}


@dataclass(slots=True)
class Standing:
    """A peer's totals over the known games; amounts in tokens. `balance` None: not read."""

    peer_id: str
    num_bets: int = 0
    staked: float = 0.0
    paid: float = 0.0
    balance: float | None = None


def standings(games: list[Game]) -> list[Standing]:
    """Return the peers that bet, those with the most claimed first."""
    found: defaultdict[str, Standing] = defaultdict(lambda: Standing(""))
    for game in games:
        for bet in game.bets:
            row = found[bet.peer_id]
            row.peer_id = bet.peer_id
            row.num_bets += 1
            row.staked += bet.amount
        for peer_id, tokens in game.paid.items():
            found[peer_id].peer_id = peer_id
            found[peer_id].paid += tokens
    return sorted(found.values(), key=lambda row: (-row.paid, row.peer_id))


def _shares_of_one(supplies: list[float]) -> list[float]:
    total = sum(supply**2 for supply in supplies)
    return [supply**2 / total for supply in supplies]
