"""Make a node's own groups of a round: put the tasks to the policy and score its answers.

The node and the learning benchmarks use it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from worker.environments import Environment
from worker.policy.policy import Policy
from worker.records import Completion, Rollout, ScoredGroup, Task
from worker.settings import Generation, Settings


@dataclass(frozen=True, slots=True)
class Answered:
    """Scored groups of a round.

    `num_too_long`: number of tasks left out because their prompts are longer than the settings
    allow.
    """

    groups: list[ScoredGroup]
    num_too_long: int

    @property
    def num_tokens(self) -> int:
        return sum(
            len(completion.token_ids) for group in self.groups for completion in group.sampled
        )


def generate(
    policy: Policy,
    environment: Environment,
    generation: Generation,
    tasks: Sequence[Task],
    seed: int,
) -> tuple[list[str], list[list[Completion] | None]]:
    """Return the questions of `tasks` and the completions of each.

    The completions of a task are None if its prompt is too long.
    """
    questions = [environment.question(task) for task in tasks]
    return questions, policy.generate(questions, generation, seed)


def score(
    environment: Environment,
    tasks: Sequence[Task],
    questions: Sequence[str],
    answers: Sequence[Sequence[Completion] | None],
) -> Answered:
    """Score the completions returned by `generate`."""
    groups = [
        score_group(environment, task, question, completions)
        for task, question, completions in zip(tasks, questions, answers, strict=True)
        if completions is not None
    ]
    return Answered(groups, len(tasks) - len(groups))


def teach_enough(groups: Iterable[ScoredGroup], settings: Settings) -> bool:
    """Return whether enough of these groups (our own and peers') have a signal for a step.

    A step on one or two groups moves the weights as far as a step on many groups, but its direction
    is mostly chance (docs/decisions/0035).
    """
    wanted = min(settings.trainer.local_groups, settings.environment.tasks_per_round)
    return sum(group.signal for group in groups) >= wanted


def score_group(
    environment: Environment, task: Task, question: str, completions: Sequence[Completion]
) -> ScoredGroup:
    rewards = environment.score(task, [completion.text for completion in completions])
    rollouts = (Rollout(c.text, reward, c) for c, reward in zip(completions, rewards, strict=True))
    return ScoredGroup(task, question, tuple(rollouts))
