"""Credit answers for their format where a model does not yet close its answer tag.

Where all answers to a task earn nothing, those that closed the tag get an advantage over those that
did not; rewards stay what they are. The credit fades as answers close by themselves and ends when
three in ten do: from then on rewards teach the format, too, and credit for wrong answers would only
make the model repeat them (docs/decisions/0027).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from worker.records import ScoredGroup

ENOUGH = 0.3
"""Share of closed answers from which on there is no credit."""


def give_credit(
    groups: Sequence[ScoredGroup], is_closed: Callable[[str], bool]
) -> list[ScoredGroup]:
    """Return our own groups of a round, with credits where all rewards are 0."""
    weight = 1 - closed_share(groups, is_closed) / ENOUGH
    if weight <= 0:
        return list(groups)
    return [
        group if any(group.rewards) else _with_credit(group, weight, is_closed) for group in groups
    ]


def _with_credit(
    group: ScoredGroup, weight: float, is_closed: Callable[[str], bool]
) -> ScoredGroup:
    rollouts = (
        replace(rollout, credit=weight * is_closed(rollout.text)) for rollout in group.rollouts
    )
    return replace(group, rollouts=tuple(rollouts))


def closed_share(groups: Sequence[ScoredGroup], is_closed: Callable[[str], bool]) -> float:
    """Return the share of answers that closed their tag."""
    closed = [is_closed(text) for group in groups for text in group.completions]
    return sum(closed) / max(1, len(closed))
