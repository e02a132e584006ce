"""Compare weights on the same held-out tasks, and test whether a difference is significant."""

import hashlib
import math
from collections.abc import Mapping, Sequence

from worker.environments import Environment
from worker.evaluation import HELD_OUT, Asked, Estimate, Score, fixed_tasks

QUANTILE = 2.5
"""Quantile of the normal distribution for intervals. A trial (worker/adoption.py) computes up to
twelve; in one of them, one in 40 candidates that are no better seems to be better."""
MIN_TASKS = 16
"""With fewer paired tasks no difference is significant."""

Rewards = Mapping[Asked, Sequence[float]]
"""The mean reward of each task, in the order of the tasks, by family and level."""


def choose_tasks(
    environment: Environment,
    levels: Mapping[str, int],
) -> list[Asked]:
    """Return each family at its first level and, if it has one, at its level in `levels`."""
    asked: list[Asked] = []
    for family, first in fixed_tasks(environment):
        asked.append((family, first))
        level = levels.get(family, 0)
        if first is not None and level > first:
            asked.append((family, level))
    return asked


def tasks_digest(
    environment: Environment,
    asked: Sequence[Asked],
    count: int,
    seed: int,
) -> str:
    """Return a digest of the recipes; evaluations with different digests can't be compared."""
    digest = hashlib.sha256()
    for one in asked:
        for task in environment.tasks_of(*one, HELD_OUT + seed, count):
            digest.update(repr(task).encode())
    return digest.hexdigest()


def rewards_of(scores: Sequence[Score]) -> Rewards:
    """Return the rewards of an evaluation."""
    return {(score.family, score.level): score.rewards for score in scores}


def common_means(candidates: Sequence[Rewards]) -> list[float]:
    """Return each candidate's mean reward over the tasks that all of them have answered.

    Families and levels count equally. NaN if there is no such task.
    """
    counts = {
        one: min(len(rewards.get(one, ())) for rewards in candidates)
        for one in (candidates[0] if candidates else ())
    }
    asked = [one for one, count in counts.items() if count]
    means = []
    for rewards in candidates:
        values = [math.fsum(rewards[one][: counts[one]]) / counts[one] for one in asked]
        means.append(math.fsum(values) / len(values) if values else math.nan)
    return means


def pair_up(ours: Rewards, theirs: Rewards) -> list[float]:
    """Return `theirs` minus `ours` for each task that both have answered."""
    return [
        their - our
        for one in ours
        for our, their in zip(ours[one], theirs.get(one, ()), strict=False)
    ]


def estimate(pairs: Sequence[float]) -> Estimate:
    """Return the mean of the tasks' differences, with an interval of QUANTILE standard errors.

    With fewer than MIN_TASKS the interval is infinite.
    """
    count = len(pairs)
    mean = math.fsum(pairs) / count if count else 0.0
    if count < MIN_TASKS:
        return Estimate(mean, -math.inf, math.inf)
    variance = math.fsum((pair - mean) ** 2 for pair in pairs) / (count - 1)
    half = QUANTILE * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half)
