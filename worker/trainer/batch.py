"""Draw the groups that a node trains on: I of its own, J of its peers' (swarm sampling, SAPO, arXiv
2509.08721)."""

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
    """The groups that one step trains on. `num_local` and `num_external` count `groups`; `dropped`
    counts what was left out:

    by its fault ("no-signal-local", "prompt-length-external"), as "surplus-local" or
    "surplus-external" (not drawn), and as "missing-local" or "missing-external": how many of I and
    J there were not.
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
    """Draw I local and J external groups, after dropping those that have a fault: they must not
    take up a place.

    With `fill_missing` the other kind fills what one kind lacks.
    """
    dropped: Counter[str] = Counter()
    useful_local = _drop_faulty(local, "local", find_fault, dropped)
    useful_external = _drop_faulty(external, "external", find_fault, dropped)
    num_local = min(trainer.local_groups, len(useful_local))
    num_external = min(trainer.external_groups, len(useful_external))
    missing_local, missing_external = (
        trainer.local_groups - num_local,
        trainer.external_groups - num_external,
    )
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
        if fault != "no-signal":  # which is every day's
            log.warning(
                "group dropped reason=%s family=%s peer=%s",
                fault,
                group.task.family,
                group.peer_id or "self",
            )
    return usable
