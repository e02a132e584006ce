"""A node's own groups: answers next to their tasks, and tasks whose prompts are too long."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.groups import scored_group
from worker import rollouts, settings
from worker.records import Completion, Task

TASKS = [Task("sum", "0" * 12, 7, index) for index in range(3)]


class Sums:
    def question(self, task: Task) -> str:
        return f"{task.seed}+{task.index}?"

    def score(self, task: Task, texts: Sequence[str]) -> list[float]:
        return [float(text == str(task.seed + task.index)) for text in texts]


class Policy:
    """Answers with 7 and 8, apart from the second question, which is too long."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def generate(
        self, questions: Sequence[str], generation: settings.Generation, seed: int
    ) -> list[list[Completion] | None]:
        self.calls.append((questions, generation, seed))
        answers = [Completion("7", (1, 2), (), False), Completion("8", (3,), (), False)]
        return [answers, None, answers][: len(questions)]


def test_answers_are_scored_with_their_own_tasks() -> None:
    policy, environment, generation = Policy(), Sums(), settings.Generation()
    questions, answers = rollouts.generate(policy, environment, generation, TASKS, 5)  # type: ignore[arg-type]
    assert policy.calls == [(["7+0?", "7+1?", "7+2?"], generation, 5)]
    answered = rollouts.score(environment, TASKS, questions, answers)  # type: ignore[arg-type]
    first, third = answered.groups
    assert (first.task, first.question, first.rewards) == (TASKS[0], "7+0?", (1.0, 0.0))
    assert (third.task, third.question, third.rewards) == (TASKS[2], "7+2?", (0.0, 0.0))
    assert (answered.num_too_long, answered.num_tokens) == (1, 6)
    assert first.peer_id is None
    assert first.sampled == tuple(answers[0])  # type: ignore[arg-type]


def test_no_tasks_no_groups() -> None:
    answered = rollouts.score(Sums(), [], [], [])  # type: ignore[arg-type]
    assert (answered.groups, answered.num_too_long, answered.num_tokens) == ([], 0, 0)


@pytest.mark.parametrize(
    ("full", "slight", "local_groups", "tasks", "enough"),
    [
        (5, 0, 5, 9, True),
        (4, 13, 5, 9, False),  # a group of 0.01 and 0.03 has a signal of 0.07
        (4, 15, 5, 9, True),
        (4, 0, 5, 4, True),  # a part has no more tasks
        (0, 0, 0, 9, True),  # the node trains on peers' groups alone
    ],
)
def test_step_needs_as_many_groups_that_teach_as_the_settings_say(
    full, slight, local_groups, tasks, enough
):
    made = settings.from_flat(
        {
            "model_name": "any",
            "trainer_local_groups": local_groups,
            "environment_tasks_per_round": tasks,
        },
        "test",
    )
    groups = [scored_group(TASKS[0], "?", ("a", "b"), (0.0, 1.0))] * full
    groups += [scored_group(TASKS[0], "?", ("a", "b"), (0.01, 0.03))] * slight
    assert rollouts.teach_enough(groups, made) == enough
