"""Give answers credit for their format while a model does not yet close its answer tag.

If all answers to a task have the reward 0, those that closed the tag get a credit, from which the
trainer computes advantages; rewards do not change. The credit falls as the share of closed answers
rises, and is 0 from three in ten on. From then on rewards teach the format too, and credit for
wrong answers would only make the model repeat them (docs/decisions/0027).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from worker.records import ScoredGroup

ENOUGH = 0.3
"""Smallest share of answers with a closed tag at which no credit is given."""


def give_credit(
    groups: Sequence[ScoredGroup], is_closed: Callable[[str], bool]
) -> list[ScoredGroup]:
    """Return the node's own groups of a round, with credits in those whose rewards are all 0."""
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


def closed_share(
    groups: Sequence[ScoredGroup],
    is_closed: Callable[[str], bool],
) -> float:
    """Return the share of answers that closed their tag; 0 without answers."""
    closed = [is_closed(text) for group in groups for text in group.completions]
    return sum(closed) / max(1, len(closed))
