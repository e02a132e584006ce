"""Credit for the format: what a model learns from that never earns anything.

Where all answers to a task earn nothing, those that closed their tag are told apart from those that
did not, in the advantages alone. The credit fades as answers close by themselves, and is gone when
four in five do.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from worker.records import ScoredGroup

ENOUGH = 0.8
"""Share of closed answers from which on there is no credit."""


def give_credit(
    groups: Sequence[ScoredGroup], is_closed: Callable[[str], bool]
) -> list[ScoredGroup]:
    """Return our own groups of a round, with credits where rewards are all 0."""
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
    """The share of answers that closed their tag."""
    closed = [is_closed(text) for group in groups for text in group.completions]
    return sum(closed) / max(1, len(closed))
