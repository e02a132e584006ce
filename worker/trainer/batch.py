"""Draw the groups that a node trains on: I of its own and J of its peers.

This is the swarm sampling of SAPO (arXiv 2509.08721). I is `trainer.local_groups`, J is
`trainer.external_groups`.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from worker import settings
from worker.records import ScoredGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """The groups that one step trains on.

    `num_local` and `num_external` are the numbers of own and of peers' groups in `groups`.
    `dropped` counts the groups that were left out, by reason: a fault ("no-signal-local",
    "prompt-length-external"), or "surplus-local" and "surplus-external" for usable groups that were
    not drawn. Its "missing-local" and "missing-external" are the numbers of groups by which I and J
    were not reached.
    """

    groups: tuple[ScoredGroup, ...]
    num_local: int
    num_external: int
    dropped: dict[str, int] = field(default_factory=dict)


def choose(
    local: Sequence[ScoredGroup],
    external: Sequence[ScoredGroup],
    trainer: settings.Trainer,
    rng: random.Random,
    find_fault: Callable[[ScoredGroup], str | None],
) -> Batch:
    """Draw I local and J external groups at random, from those without a fault.

    `find_fault` returns the reason why a group can't be used, or None. With `fill_missing`,
    groups of one kind replace missing ones of the other.
    """
    dropped: Counter[str] = Counter()
    useful_local = _drop_faulty(local, "local", find_fault, dropped)
    useful_external = _drop_faulty(external, "external", find_fault, dropped)
    num_local = min(trainer.local_groups, len(useful_local))
    num_external = min(trainer.external_groups, len(useful_external))
    missing_local = trainer.local_groups - num_local
    missing_external = trainer.external_groups - num_external
    if trainer.fill_missing:
        num_local += min(missing_external, len(useful_local) - num_local)
        num_external += min(missing_local, len(useful_external) - num_external)
    dropped |= {
        "surplus-local": len(useful_local) - num_local,
        "surplus-external": len(useful_external) - num_external,
        "missing-local": missing_local,
        "missing-external": missing_external,
    }
    groups = (*rng.sample(useful_local, num_local), *rng.sample(useful_external, num_external))
    return Batch(groups, num_local, num_external, {reason: n for reason, n in dropped.items() if n})


def _drop_faulty(
    groups: Sequence[ScoredGroup],
    kind: str,
    find_fault: Callable[[ScoredGroup], str | None],
    dropped: Counter[str],
) -> list[ScoredGroup]:
    usable = []
    for group in groups:
        fault = find_fault(group)
        if fault is None:
            usable.append(group)
            continue
        dropped[f"{fault}-{kind}"] += 1
        if fault != "no-signal":  # that one is normal and frequent
            log.warning(
                "group dropped reason=%s family=%s peer=%s",
                fault,
                group.task.family,
                group.peer_id or "self",
            )
    return usable
