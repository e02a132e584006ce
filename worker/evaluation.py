"""Evaluate a policy on tasks that training never asks, by family and level.

The results are mean reward, pass@1 and pass@k. The tasks are of seeds from `HELD_OUT` on; a round's
seeds are all below it (`records.round_seed`). The same `seed` gives the same tasks, so that two
checkpoints can be compared.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from worker import settings
from worker.environments import Environment
from worker.environments.answers import END
from worker.errors import NotScored, TrainingError
from worker.judge import problems
from worker.market import policies
from worker.market.player import Opinion
from worker.records import Completion, Task
from worker.telemetry.evaluation_log import Evaluation, FamilyScore

HELD_OUT = 1 << 31
"""First seed of held-out tasks: seeds of rounds have only 31 bits."""
RIGHT = 0.999
"""Answers with at least this reward are right."""
_TASKS_AT_ONCE = 16
NUM_CHOICES = settings.Judge().choices
"""Number of choices of the questions that measure calibration, as in the prediction market."""
_QUANTILE = 1.96  # of the normal distribution: intervals of 95 %


class Answering(Protocol):
    """The part of `policy.Policy` that an evaluation uses."""

    def generate(
        self, questions: Sequence[str], generation: settings.Generation, seed: int
    ) -> list[list[Completion] | None]: ...


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share or a mean, with its confidence interval (95 %, unless another is stated)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Score:
    """The result of one family at one level; `pass_at` by k.

    `closed`: share of answers with a closed tag; `truncated`: share of truncated answers.
    `too_long`: number of tasks that were skipped because their prompts are too long. `rewards`: the
    mean reward of each of `tasks`, in the order in which they were asked. `brier`: mean Brier score
    of the model's probabilities of right and wrong answers; None: not measured.
    """

    family: str
    level: int | None
    tasks: int
    answers: int
    reward: Estimate
    pass_at: dict[int, Estimate]
    closed: float
    truncated: float
    too_long: int = 0
    rewards: tuple[float, ...] = ()
    brier: float | None = None


@dataclass(slots=True)
class _Tally:
    """Answers of one family at one level, by task."""

    rewards: list[list[float]] = field(default_factory=list)
    closed: int = 0
    truncated: int = 0
    too_long: int = 0
    briers: list[float] = field(default_factory=list)


Asked = tuple[str, int | None]
"""A family of the environment and a level of its curriculum; None: its plain configuration."""


def evaluate(
    policy: Answering,
    environment: Environment,
    generation: settings.Generation,
    asked: Sequence[Asked],
    tasks_each: int,
    seed: int = 0,
    until: float = math.inf,
    progress: Callable[[], None] = lambda: None,
    opinion: Opinion | None = None,
) -> list[Score]:
    """Put `tasks_each` held-out tasks of each of `asked` to the policy, and return the scores.

    Each task gets `generation.num_generations` answers. The tasks alternate between the families,
    so that an evaluation that ends early (`until`, monotonic seconds) has asked about equally many
    of each; `Score.tasks` is their number. `progress` is called before each batch. With `opinion`,
    the calibration is measured too. Raises SettingsError for an unknown family or level.
    """
    tallies: dict[Asked, _Tally] = {one: _Tally() for one in asked}
    drawn = {one: environment.tasks_of(*one, HELD_OUT + seed, tasks_each) for one in asked}
    turns = [(one, drawn[one][i]) for i in range(tasks_each) for one in asked]
    for number, piece in enumerate(_pieces(turns)):
        if number and time.monotonic() > until:
            break
        progress()
        questions = [environment.question(task) for _, task in piece]
        answers = policy.generate(questions, generation, seed * 1_000_003 + number)
        for (one, task), completions in zip(piece, answers, strict=True):
            _count(tallies[one], environment, task, completions)
            if opinion is not None:
                _calibrate(tallies[one], environment, task, opinion)
    return [_score(one, tally) for one, tally in tallies.items()]


def fixed_tasks(environment: Environment) -> list[Asked]:
    """Return the families that a node evaluates, each at its curriculum's first level.

    The choice never changes, so that the evaluations of a node can be compared.
    """
    curricula = environment.levels
    return [(name, 0 if name in curricula else None) for name in environment.names]


def measure(
    policy: Answering,
    environment: Environment,
    generation: settings.Generation,
    asked: Sequence[Asked],
    tasks_each: int,
    *,
    seed: int,
    seconds: float,
    round: int | None,
    rounds_trained: int,
    progress: Callable[[], None] = lambda: None,
    opinion: Opinion | None = None,
) -> Evaluation:
    """Evaluate the policy for at most `seconds`, and return a record for the evaluation log.

    `tasks_each` held-out tasks of each of `asked` are put to it. `progress` is called before each
    batch. `opinion`: the model's log-probabilities, to measure its calibration. Raises
    TrainingError if no task was answered.
    """
    started = time.monotonic()
    scores = evaluate(
        policy,
        environment,
        generation,
        asked,
        tasks_each,
        seed=seed,
        until=started + seconds,
        progress=progress,
        opinion=opinion,
    )
    reward = mean_reward(scores)
    if math.isnan(reward):
        raise TrainingError(
            "no held-out task was answered: every prompt is over generation.max_prompt_length"
            f" ({generation.max_prompt_length} tokens); raise it, or choose other families"
        )
    return Evaluation(
        round=round,
        rounds_trained=rounds_trained,
        finished_at=time.time(),
        seconds=time.monotonic() - started,
        reward=reward,
        scores=tuple(_family_score(score) for score in scores if score.tasks),
    )


def mean_reward(scores: Sequence[Score]) -> float:
    """Return the mean over families and levels with equal weights, without those not asked."""
    values = [score.reward.value for score in scores if score.tasks]
    return sum(values) / len(values) if values else math.nan


def pass_at_k(
    num_answers: int,
    num_right: int,
    k: int,
) -> float:
    """Return the unbiased estimate of the chance that at least one of k answers is right."""
    if num_answers - num_right < k:
        return 1.0
    return 1.0 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)


def interval(mean: float, count: int) -> Estimate:
    """Return Wilson's interval for a mean of `count` values in [0, 1]; valid if all are equal."""
    if not count:
        return Estimate(math.nan, 0.0, 1.0)
    square = _QUANTILE**2
    middle = (mean + square / (2 * count)) / (1 + square / count)
    half = (
        _QUANTILE
        / (1 + square / count)
        * math.sqrt(mean * (1 - mean) / count + square / (4 * count**2))
    )
    return Estimate(mean, max(0.0, middle - half), min(1.0, middle + half))


def _family_score(score: Score) -> FamilyScore:
    k = max(score.pass_at)
    return FamilyScore(
        family=score.family,
        level=score.level,
        tasks=score.tasks,
        reward=score.reward.value,
        reward_low=score.reward.low,
        reward_high=score.reward.high,
        pass_1=score.pass_at[1].value,
        pass_k=score.pass_at[k].value,
        k=k,
        closed=score.closed,
        truncated=score.truncated,
        brier=score.brier,
    )


def _pieces(turns: Sequence[tuple[Asked, Task]]) -> Iterator[Sequence[tuple[Asked, Task]]]:
    for start in range(0, len(turns), _TASKS_AT_ONCE):
        yield turns[start : start + _TASKS_AT_ONCE]


def _count(
    tally: _Tally, environment: Environment, task: Task, completions: list[Completion] | None
) -> None:
    if completions is None:
        tally.too_long += 1
        return
    texts = [completion.text for completion in completions]
    tally.rewards.append(environment.score(task, texts))
    tally.closed += sum(END in text for text in texts)
    tally.truncated += sum(completion.truncated for completion in completions)


def _calibrate(tally: _Tally, environment: Environment, task: Task, opinion: Opinion) -> None:
    """Add the Brier score of a task with choices, unless it has too few or too long ones."""
    problem = problems.of_task(environment, task, NUM_CHOICES, 1, task.seed)
    if problem is None:
        return
    try:
        found = opinion.logprobs(problem.clues[-1], list(problem.choices), math.inf)
    except NotScored:
        return
    tally.briers.append(policies.brier(policies.probabilities(found), problem.answer))


def _score(one: Asked, tally: _Tally) -> Score:
    tasks = len(tally.rewards)
    answers = sum(map(len, tally.rewards))
    size = min(map(len, tally.rewards), default=0)

    def average(values: Sequence[float]) -> Estimate:
        return interval(math.fsum(values) / tasks if tasks else math.nan, tasks)

    right = [
        (len(rewards), sum(reward >= RIGHT for reward in rewards)) for rewards in tally.rewards
    ]
    means = tuple(math.fsum(rewards) / len(rewards) for rewards in tally.rewards)
    return Score(
        family=one[0],
        level=one[1],
        tasks=tasks,
        answers=answers,
        reward=average(means),
        pass_at={
            k: average([pass_at_k(*task, k) for task in right])
            for k in sorted({1, size})
            if 0 < k <= size
        },
        closed=tally.closed / answers if answers else 0.0,
        truncated=tally.truncated / answers if answers else 0.0,
        too_long=tally.too_long,
        rewards=means,
        brier=math.fsum(tally.briers) / len(tally.briers) if tally.briers else None,
    )
