"""Verify peers' groups: regenerate each task and score its completions here.

Questions, right answers and rewards are never taken from a peer; they are not even sent.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

from worker import settings
from worker.errors import BadRecord
from worker.records import MAX_PART_TASKS, Group, Rollout, ScoredGroup, Task, round_seed
from worker.swarm.protocol.messages import Limits, hash_families

INNOCENT = frozenset({"version", "unknown-task", "late"})
"""Reasons for which a group is dropped without blaming its sender.

The sender runs another version or other task families, or there was not enough time to score the
group, because of the round or of this machine.
"""
MIN_COMPLETIONS = 2
"""A group with fewer completions has no advantages."""


class TaskSource(Protocol):
    """The part of the environments that the verifier uses.

    Both methods raise BadRecord for an unknown task.
    """

    @property
    def versions(self) -> tuple[str, ...]:
        """Return names and versions of the environments, such as "reasoning-gym 0.1.25"."""
        ...

    @property
    def families(self) -> tuple[str, ...]:
        """Return the names of the mix's task families; on two nodes, same name means same tasks."""
        ...

    def question(self, task: Task) -> str: ...

    def score(
        self,
        task: Task,
        completions: Sequence[str],
    ) -> list[float]:
        """Return a reward in [0, 1] for each completion, in bounded time."""
        ...


class Verifier:
    """Checks peers' groups. It scores, so it is slow: never call it in the event loop."""

    def __init__(
        self,
        tasks: TaskSource,
        swarm: settings.Swarm,
        max_group_size: int,
    ) -> None:
        self._tasks = tasks
        self.environments = tasks.versions
        self.families = hash_families(tasks.families)
        self.limits = Limits(swarm.max_groups_per_peer, max_group_size, swarm.max_completion_bytes)

    def verify(
        self,
        peer_id: str,
        round: int,
        group: Group,
        part: int = 0,
    ) -> ScoredGroup:
        """Return the group with our own question and rewards. Raises BadRecord if it is invalid."""
        task, limits = group.task, self.limits
        seed = round_seed(peer_id, round)
        if task.seed != seed:
            raise BadRecord(
                "seed", f"task seed {task.seed} of {peer_id} in round {round}; expected {seed}"
            )
        first = part * MAX_PART_TASKS
        if not first <= task.index < first + limits.num_groups:
            raise BadRecord(
                "index",
                f"task index {task.index}; expected {first} to {first + limits.num_groups - 1}",
            )
        if not MIN_COMPLETIONS <= len(group.completions) <= limits.num_completions:
            raise BadRecord(
                "num-completions",
                f"{len(group.completions)} completions; expected {MIN_COMPLETIONS} to"
                f" {limits.num_completions}",
            )
        longest = max(len(c.encode(errors="surrogatepass")) for c in group.completions)
        if longest > limits.completion_bytes:
            raise BadRecord(
                "too-long",
                f"completion of {longest} bytes; at most {limits.completion_bytes} are accepted",
            )
        question = self._tasks.question(task)
        rewards = self._tasks.score(task, group.completions)
        if len(rewards) != len(group.completions) or not all(
            math.isfinite(r) and 0 <= r <= 1 for r in rewards
        ):
            raise BadRecord("score", f"task {task.family} can't score these completions: {rewards}")
        return ScoredGroup(
            task, question, tuple(map(Rollout, group.completions, rewards)), peer_id=peer_id
        )

    def verify_each(
        self,
        peer_id: str,
        round: int,
        groups: Sequence[Group],
        part: int = 0,
    ) -> Iterator[ScoredGroup | BadRecord]:
        """Yield each group if it is valid, otherwise the error. A repeated task counts once."""
        seen = Counter[Task]()
        for group in groups:
            seen[group.task] += 1
            try:
                if seen[group.task] > 1:
                    raise BadRecord(
                        "duplicate", f"task {group.task.family} {group.task.index} came twice"
                    )
                scored = self.verify(peer_id, round, group, part)
            except BadRecord as error:
                yield error
            else:
                yield scored

    def verify_all(
        self,
        peer_id: str,
        round: int,
        groups: Sequence[Group],
        until: float = math.inf,
    ) -> tuple[list[ScoredGroup], list[BadRecord]]:
        """Return a peer's valid groups, and the errors of the others.

        Raises BadRecord ("slow-to-score") if `until` (monotonic seconds) passes before all groups
        are scored.
        """
        results: list[ScoredGroup | BadRecord] = []
        for result in self.verify_each(peer_id, round, groups):
            results.append(result)
            if len(results) < len(groups) and time.monotonic() > until:
                raise BadRecord("slow-to-score", f"groups of {peer_id} take too long to score")
        bad = [result for result in results if isinstance(result, BadRecord)]
        return [result for result in results if isinstance(result, ScoredGroup)], bad
