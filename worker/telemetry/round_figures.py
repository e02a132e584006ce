"""Figures of a round's own groups by family and level (`status.FamilyReward`)."""

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import groupby

from worker.records import ScoredGroup, Task
from worker.telemetry.status import FamilyReward


def by_family(
    groups: Sequence[ScoredGroup], level_of: Callable[[Task], int | None]
) -> tuple[FamilyReward, ...]:
    """Return the rewards of each family and level, in the order of their names.

    Groups with a reward that is not finite are left out, as they are in training.
    """

    def key(group: ScoredGroup) -> tuple[str, int]:
        level = level_of(group.task)
        return group.task.family, -1 if level is None else level

    finite = [group for group in groups if all(map(math.isfinite, group.rewards))]
    ordered = sorted(finite, key=key)
    return tuple(
        _summarise(family, None if level < 0 else level, list(members))
        for (family, level), members in groupby(ordered, key=key)
    )


def _summarise(
    family: str,
    level: int | None,
    groups: Sequence[ScoredGroup],
) -> FamilyReward:
    rewards = [reward for group in groups for reward in group.rewards]
    return FamilyReward(
        family=family,
        level=level,
        groups=len(groups),
        reward=statistics.fmean(rewards),
        reward_std=statistics.stdev(rewards) if len(rewards) > 1 else 0.0,
        frac_reward_zero_std=sum(not group.has_signal for group in groups) / len(groups),
    )
