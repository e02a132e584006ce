"""Write a round's groups to the log of answers (`hivewright answers`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from worker.environments import Environment
from worker.policy.policy import Policy
from worker.records import ScoredGroup
from worker.telemetry import answer_log
from worker.telemetry.answer_log import AnsweredGroup, AnswerLog
from worker.trainer.trainer import Learned


@dataclass(frozen=True, slots=True)
class AnswerRecords:
    """Makes the records of a node's rounds, and writes them to `log`."""

    log: AnswerLog
    environment: Environment
    policy: Policy

    def write(
        self,
        round: int,
        groups: Sequence[ScoredGroup],
        learned: Sequence[Learned],
    ) -> None:
        """Write a record of each group; `learned` has those that the step trained on."""
        by_task = {(each.group.peer_id, each.group.task): each for each in learned}
        records = [
            self._make(round, group, by_task.get((group.peer_id, group.task))) for group in groups
        ]
        self.log.write(round, records)

    def _make(
        self,
        round: int,
        group: ScoredGroup,
        found: Learned | None,
    ) -> AnsweredGroup:
        nothing = (0.0,) * len(group.rollouts)
        return answer_log.of_group(
            group,
            round,
            level=self.environment.level_of(group.task),
            form=self.policy.form.name,
            right=self.environment.answer(group.task),
            trained=found is not None,
            advantages=nothing if found is None else found.advantages,
            logprobs=_logprobs(group, found),
        )


def _logprobs(
    group: ScoredGroup,
    learned: Learned | None,
) -> list[float | None]:
    """Return the mean log-probability of each answer.

    The value is the training step's if there is one, else the sampler's; None without either.
    """
    sampled = [
        fmean(one.sampled.logprobs) if one.sampled and one.sampled.logprobs else None
        for one in group.rollouts
    ]
    if learned is None:
        return sampled
    return [
        own if seen is None else seen for seen, own in zip(learned.logprobs, sampled, strict=True)
    ]
