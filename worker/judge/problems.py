"""Make the problems of games: clues to a question, and choices, one of which is right.

They come from the tasks of an environment, or from a file. A task's clues are growing parts of its
text, and its wrong choices are the right answers of other tasks of its family.
"""

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from worker.environments import Environment
from worker.environments.answers import tagged
from worker.errors import BadRecord, SettingsError
from worker.judge import past_games
from worker.records import Task
from worker.runtime.files import write_whole
from worker.settings import Judge

log = logging.getLogger(__name__)

_RIGHT = 0.999
_OTHER_TASKS = 8
"""Number of tasks to draw for each wrong choice, because some have the same answer."""
_MAX_DRAWS = 64
_MAX_CHOICE = 200
"""Longest choice, in characters."""

Text = Annotated[str, Field(min_length=1, max_length=20_000)]
Choice = Annotated[str, Field(min_length=1, max_length=_MAX_CHOICE)]


class Problem(BaseModel):
    """A problem: a clue for each round, the choices, and the index of the right one.

    `family`: the task family that it is from; None: unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    clues: Annotated[tuple[Text, ...], Field(min_length=1, max_length=64)]
    choices: Annotated[tuple[Choice, ...], Field(min_length=2, max_length=64)]
    answer: Annotated[int, Field(ge=0)]
    family: Annotated[str, Field(min_length=1, max_length=100)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer is {self.answer}, and there are {len(self.choices)} choices")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("a choice occurs twice")
        return self


def source(
    judge: Judge,
    load: Callable[[], Environment],
) -> Iterator[Problem]:
    """Return the problems of `judge.problems_file`, each once, or endless random ones.

    Raises SettingsError if the file is invalid, or the environment has no task that fits.
    """
    if judge.problems_file is not None:
        return _once(read(judge.problems_file), judge)
    return _drawn(load(), judge)


def read(file: Path) -> list[Problem]:
    """Read a file of problems. Raises SettingsError with its first mistake."""
    where = f"{file} (judge.problems_file)"
    try:
        # Texts may have the other separators that splitlines knows, such as U+2028.
        lines = file.read_text().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{where}: can't be read: {error}; expected one problem per line"
        ) from None
    if lines == [""]:
        raise SettingsError(f"{where}: is empty; expected one problem per line")
    problems = []
    for number, line in enumerate(lines, 1):
        try:
            problems.append(Problem.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = "/".join(str(part) for part in first["loc"])
            raise SettingsError(
                f"{where}: line {number}: {place}: {first['msg']}; expected an object with clues,"
                " choices and answer"
            ) from None
    return problems


def _once(problems: list[Problem], judge: Judge) -> Iterator[Problem]:
    """Yield the problems that this judge has never asked: the answers of the others are public.

    The digests of asked problems are stored, so lines may be added to the file or moved. Earlier
    versions stored only the games that ended.
    """
    file = judge.state_dir / "asked.txt"
    past = past_games.read(judge.state_dir / past_games.FILE)
    asked = dict.fromkeys(_digest(game["clues"], game["choices"]) for game in past)
    if file.exists():
        asked |= dict.fromkeys(file.read_text().split())
    for problem in problems:
        digest = _digest(problem.clues, problem.choices)
        if digest not in asked:
            asked[digest] = None
            write_whole(file, "".join(f"{known}\n" for known in asked))
            yield problem
    log.warning(
        "no more games: all %d problems of %s (judge.problems_file) were asked, and their answers"
        " are public; add others and restart the judge",
        len(problems),
        judge.problems_file,
    )


def _digest(clues: Sequence[str], choices: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([list(clues), sorted(choices)]).encode()).hexdigest()


def _drawn(
    environment: Environment,
    judge: Judge,
) -> Iterator[Problem]:
    """Draw problems with unpredictable seeds: a player who knew them could compute the answers."""
    while True:
        for _ in range(_MAX_DRAWS):
            problem = of_seed(environment, judge, secrets.randbits(31))
            if problem is not None:
                break
        else:
            families = ", ".join(environment.names)
            raise SettingsError(
                f"environment.families: none of {_MAX_DRAWS} tasks of {families} has"
                f" {judge.choices} different short answers; choose other families, or lower"
                " judge.choices"
            )
        yield problem


def of_seed(
    environment: Environment,
    judge: Judge,
    seed: int,
) -> Problem | None:
    """Return the problem of a seed; None if its task is not suitable."""
    (task,) = environment.sample(seed, 1)
    return of_task(environment, task, judge.choices, judge.rounds, seed)


def of_task(
    environment: Environment,
    task: Task,
    num_choices: int,
    num_rounds: int,
    seed: int,
) -> Problem | None:
    """Return the problem of a task; None if it is not suitable. `seed` chooses wrong answers."""
    right = environment.answer(task)
    try:
        question = environment.question(task)
    except BadRecord:
        return None
    if right is None or not _is_choice(right) or len(question) < num_rounds:
        return None
    choices = [right, *_wrong_choices(environment, task, right, num_choices - 1, seed)]
    if len(choices) < num_choices:
        return None
    Random(seed).shuffle(choices)
    return Problem(
        clues=tuple(_beginning(question, i + 1, num_rounds) for i in range(num_rounds)),
        choices=tuple(choices),
        answer=choices.index(right),
        family=task.family,
    )


def _wrong_choices(
    environment: Environment, task: Task, right: str, count: int, seed: int
) -> list[str]:
    """Return up to `count` answers of other tasks of the family that are wrong for this one."""
    level = environment.level_of(task)
    others = environment.tasks_of(task.family, level, seed ^ 1, _OTHER_TASKS * count)
    answers = dict.fromkeys(environment.answer(other) for other in others)
    wrong: list[str] = []
    for answer in answers:
        if len(wrong) == count:
            break
        if answer is None or answer == right or not _is_choice(answer):
            continue
        if environment.score(task, [tagged(answer)])[0] < _RIGHT:
            wrong.append(answer)
    return wrong


def _is_choice(answer: str) -> bool:
    return 0 < len(answer) <= _MAX_CHOICE and answer == answer.strip()


def _beginning(
    question: str,
    part: int,
    parts: int,
) -> str:
    """Return the first `part` of `parts` of a question, cut between words."""
    if part == parts:
        return question
    cut = question[: len(question) * part // parts]
    return f"{cut.rpartition(' ')[0] or cut} ..."
