"""Which groups a node trains on: I of its own, J of its peers' (swarm sampling, SAPO, arXiv 2509.08721)."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from worker import settings
from worker.records import ScoredGroup


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step trains on. `num_local` and `num_external` count `groups`; `dropped` counts what was left out:

    "no-signal-local", "no-signal-external" (all rewards equal), "surplus-local", "surplus-external" (not drawn),
    and "missing-local", "missing-external": how many of I and J there were not.
    """

    groups: tuple[ScoredGroup, ...]
    num_local: int
    num_external: int
    dropped: dict[str, int] = field(default_factory=dict)


def choose(
    local: Sequence[ScoredGroup], external: Sequence[ScoredGroup], trainer: settings.Trainer, rng: random.Random
) -> Batch:
    """Draw I local and J external groups, after dropping those without a signal.

    With `fill_missing` the other kind fills what one kind lacks.
    """
    useful_local = [g for g in local if g.rewards and g.has_signal]
    useful_external = [g for g in external if g.rewards and g.has_signal]
    num_local = min(trainer.local_groups, len(useful_local))
    num_external = min(trainer.external_groups, len(useful_external))
    missing_local, missing_external = trainer.local_groups - num_local, trainer.external_groups - num_external
    if trainer.fill_missing:
        num_local += min(missing_external, len(useful_local) - num_local)
        num_external += min(missing_local, len(useful_external) - num_external)
    dropped = Counter(
        {
            "no-signal-local": len(local) - len(useful_local),
            "no-signal-external": len(external) - len(useful_external),
            "surplus-local": len(useful_local) - num_local,
            "surplus-external": len(useful_external) - num_external,
            "missing-local": missing_local,
            "missing-external": missing_external,
        }
    )
    groups = (*rng.sample(useful_local, num_local), *rng.sample(useful_external, num_external))
    return Batch(groups, num_local, num_external, {reason: n for reason, n in dropped.items() if n})
