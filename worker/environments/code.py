"""Code tasks: write a function for a list of steps, scored by hidden tests in the sandbox.

A task is made from a small grammar: a chain of steps on a list, a text or a whole number. Each step
is an English phrase with its Python expression; the phrases make the question, the expressions the
reference program. Both depend on the seed alone, so every peer has the same task and the same
hidden tests, and scores an untrusted peer's function itself. The reward is the share of the hidden
tests that the function passes.
"""

import itertools
import json
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from worker.environments.answers import extract_answer
from worker.environments.sandbox import Runner, require_isolation
from worker.environments.source import Config, Recipe
from worker.errors import SettingsError

NUM_TESTS = 12
MAX_STEPS = 6
MAX_PROGRAM_LENGTH = 8192

# (phrase, expression over x). {k} is a number in -9..9 except 0, {m} one in 2..9, {n} one in 1..4.
Steps = tuple[tuple[str, str], ...]

_LIST_STEPS: Steps = (
    ("keep only the even numbers", "[v for v in x if v % 2 == 0]"),
    ("keep only the odd numbers", "[v for v in x if v % 2 != 0]"),
    ("keep only the numbers greater than {k}", "[v for v in x if v > {k}]"),
    ("keep only the numbers less than {k}", "[v for v in x if v < {k}]"),
    ("remove the first {n} elements", "x[{n}:]"),
    ("keep only the first {n} elements", "x[:{n}]"),
    ("keep only the last {n} elements", "x[-{n}:]"),
    ("keep every second element, beginning with the first", "x[::2]"),
    ("add {k} to each number", "[v + {k} for v in x]"),
    ("multiply each number by {k}", "[v * {k} for v in x]"),
    ("replace each number by its remainder modulo {m}", "[v % {m} for v in x]"),
    ("replace each number by its absolute value", "[abs(v) for v in x]"),
    ("square each number", "[v * v for v in x]"),
    ("reverse the list", "x[::-1]"),
    ("sort the list in ascending order", "sorted(x)"),
    ("sort the list in descending order", "sorted(x, reverse=True)"),
    ("remove duplicates, keeping the first of each", "list(dict.fromkeys(x))"),
    (
        "replace each number by the sum of it and all before it",
        "[sum(x[: i + 1]) for i in range(len(x))]",
    ),
    (
        "take the differences of neighbours (each number minus the one before it)",
        "[b - a for a, b in zip(x, x[1:])]",
    ),
    ("append the sum of the list to it", "x + [sum(x)]"),
)
_LIST_ENDS: Steps = (
    ("return the list", "x"),
    ("return the sum", "sum(x)"),
    ("return the number of elements", "len(x)"),
    ("return the largest number, or 0 if there is none", "max(x, default=0)"),
    ("return the smallest number, or 0 if there is none", "min(x, default=0)"),
    ("return how many numbers are greater than {k}", "sum(v > {k} for v in x)"),
)
_TEXT_STEPS: Steps = (
    ("reverse the text", "x[::-1]"),
    ("change all letters to upper case", "x.upper()"),
    ("change all letters to lower case", "x.lower()"),
    ("swap upper and lower case", "x.swapcase()"),
    ("remove all vowels (aeiou in either case)", "''.join(c for c in x if c not in 'aeiouAEIOU')"),
    ("remove all spaces", "x.replace(' ', '')"),
    ("remove all digits", "''.join(c for c in x if not c.isdigit())"),
    ("keep only letters", "''.join(c for c in x if c.isalpha())"),
    ("remove the first {n} characters", "x[{n}:]"),
    ("keep only the first {m} characters", "x[:{m}]"),
    ("keep every second character, beginning with the first", "x[::2]"),
    ("move the first {n} characters to the end", "x[{n}:] + x[:{n}]"),
    ("repeat each character {n} times", "''.join(c * {n} for c in x)"),
    ("sort the characters by their code", "''.join(sorted(x))"),
    ("remove repeated characters, keeping the first of each", "''.join(dict.fromkeys(x))"),
    ("reverse the order of the words (separated by spaces)", "' '.join(x.split()[::-1])"),
    ("replace each space by a hyphen", "x.replace(' ', '-')"),
)
_TEXT_ENDS: Steps = (
    ("return the text", "x"),
    ("return the number of characters", "len(x)"),
    ("return the number of words (separated by spaces)", "len(x.split())"),
    ("return the list of words (separated by spaces)", "x.split()"),
    (
        "return how many vowels (aeiou in either case) there are",
        "sum(c in 'aeiouAEIOU' for c in x)",
    ),
)
_NUMBER_STEPS: Steps = (
    ("add {k}", "x + {k}"),
    ("multiply by {k}", "x * {k}"),
    ("take the absolute value", "abs(x)"),
    ("take the remainder modulo {m}", "x % {m}"),
    ("divide by {m}, rounding down", "x // {m}"),
    ("square it", "x * x"),
    ("take the sum of its decimal digits, ignoring the sign", "sum(int(c) for c in str(abs(x)))"),
    ("take the number of its decimal digits, ignoring the sign", "len(str(abs(x)))"),
    ("reverse its decimal digits, ignoring the sign", "int(str(abs(x))[::-1])"),
    (
        "halve it if it is even, else multiply by 3 and add 1",
        "(x // 2 if x % 2 == 0 else 3 * x + 1)",
    ),
    ("take the larger of it and {k}", "max(x, {k})"),
    ("take the smaller of it and {k}", "min(x, {k})"),
)
_NUMBER_ENDS: Steps = (("return the result", "x"),)

_WORDS = (
    *("apple", "Banana", "cat", "7", "dog", "Egg", "fig42", "Grape", "hat", "ink", "Jam", "kite"),
    *("9lives", "Moon", "nut", "Oak", "pie", "queen", "Rose", "sun"),
)


def _draw_list(rng: random.Random) -> list[int]:
    return [rng.randint(-20, 20) for _ in range(rng.choice((0, 1, 2, 4, 5, 6, 7, 8)))]


def _draw_text(rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(0, 5)))


def _draw_number(rng: random.Random) -> int:
    return rng.choice((rng.randint(-9, 9), rng.randint(-99, 99), rng.randint(-9999, 9999)))


@dataclass(frozen=True)
class _Kind:
    """The argument type of a family's functions, with its steps and random values."""

    argument: str
    steps: Steps
    ends: Steps
    draw: Callable[[random.Random], Any]


_KINDS = {
    "lists": _Kind("a list of whole numbers", _LIST_STEPS, _LIST_ENDS, _draw_list),
    "texts": _Kind("a text (str)", _TEXT_STEPS, _TEXT_ENDS, _draw_text),
    "numbers": _Kind("a whole number", _NUMBER_STEPS, _NUMBER_ENDS, _draw_number),
}
_DEFAULT = {"min_steps": 1, "max_steps": 3}
_LEVELS = ((1, 1), (1, 2), (2, 3), (3, 4), (4, 6))


@dataclass(frozen=True)
class _Task:
    """A question with its reference program.

    `tests`: arguments, and the JSON text of the right result.
    """

    question: str
    program: str
    tests: tuple[tuple[Any, str], ...]


class Code:
    """See `environments.Source`. Raises ResourceError if untrusted programs can't be isolated."""

    version = "code 1"
    """Incremented with every change of the task or the tests that a recipe makes."""

    def __init__(self) -> None:
        require_isolation()

    def version_of(self, family: str) -> str:
        return self.version

    def check(self, family: str, config: Config) -> None:
        if family not in _KINDS:
            names = ", ".join(f"code/{name}" for name in _KINDS)
            raise SettingsError(
                f"environment.families: code/{family}: no such family; expected one of {names}"
            )
        if unknown := config.keys() - _DEFAULT.keys():
            raise SettingsError(
                f"environment.families: code/{family}: {min(unknown)}: unknown key; expected"
                " min_steps and max_steps"
            )
        low, high = (_bounds(config)[name] for name in _DEFAULT)
        are_whole = type(low) is int and type(high) is int
        if not are_whole or not 1 <= low <= high <= MAX_STEPS:
            raise SettingsError(
                f"environment.families: code/{family}: min_steps {low}, max_steps {high}; expected "
                f"1 <= min_steps <= max_steps <= {MAX_STEPS}"
            )

    def levels(
        self,
        family: str,
        config: Config,
    ) -> list[Config]:
        levels = [{"min_steps": low, "max_steps": high, **config} for low, high in _LEVELS]
        return [level for level in levels if level["min_steps"] <= level["max_steps"]]

    def question(self, recipe: Recipe) -> str:
        return _make_task(recipe).question

    def answer(self, recipe: Recipe) -> str:
        return _make_task(recipe).program

    def score(
        self,
        recipe: Recipe,
        completions: Sequence[str],
    ) -> list[float]:
        """Return the share of the hidden tests that each completion's function passes.

        The function is the text in the last <answer>…</answer>.
        """
        task = _make_task(recipe)
        programs = [_program(completion) for completion in completions]
        inputs = [[argument] for argument, _ in task.tests]
        with Runner() as runner:
            # A duplicate program is run once: a trained model gives the same answer G times.
            shares = {
                program: _share(task, runner.run(program, "solve", inputs))
                for program in dict.fromkeys(programs)
                if program is not None
            }
        return [0.0 if program is None else shares[program] for program in programs]


SOURCE = Code


def _bounds(config: Config) -> Mapping[str, Any]:
    return {**_DEFAULT, **config}


def _program(completion: str) -> str | None:
    """Return the text between the tags, without the code fence that models add."""
    answer = extract_answer(completion)
    if answer is None or len(answer) > MAX_PROGRAM_LENGTH:
        return None
    if answer.startswith("```") and answer.endswith("```"):
        answer = answer[3:-3].removeprefix("python")
    return answer.strip("\n")


def _share(
    task: _Task,
    outputs: list[Any] | None,
) -> float:
    if outputs is None:
        return 0.0
    # Compared as JSON text, in which 1, 1.0 and true differ, and a tuple is a list.
    expected = [result for _, result in task.tests]
    num_right = sum(map(operator.eq, expected, outputs))
    return float(num_right / len(task.tests))


@lru_cache(maxsize=1024)  # a round asks for each task at least twice: its question, then its score
def _make_task(recipe: Recipe) -> _Task:
    """Draw programs until the hidden tests are informative.

    A function that always returns the same value must not pass.
    """
    kind, bounds = _KINDS[recipe.family], _bounds(json.loads(recipe.config))
    rng = random.Random(f"code/{recipe.family}/{recipe.seed}")
    while True:
        steps = _draw_steps(kind, rng.randint(bounds["min_steps"], bounds["max_steps"]), rng)
        program = _write_program(steps)
        arguments = _draw_arguments(kind, rng)
        results = _run_reference(program, arguments)
        if max(results.count(result) for result in results) <= NUM_TESTS // 2:
            question = _write_question(kind, steps, arguments[0], results[0])
            # The question shows the first; the others are the tests.
            return _Task(question, program, tuple(zip(arguments[1:], results[1:], strict=True)))


def _draw_steps(
    kind: _Kind,
    count: int,
    rng: random.Random,
) -> list[tuple[str, str]]:
    chosen = [rng.choice(kind.steps) for _ in range(count)]
    steps = [step for step, _ in itertools.groupby(chosen)]  # without repetitions
    steps.append(rng.choice(kind.ends))
    drawn = []
    for phrase, expression in steps:
        numbers = {
            "k": rng.choice((-1, 1)) * rng.randint(1, 9),
            "m": rng.randint(2, 9),
            "n": rng.randint(1, 4),
        }
        drawn.append((_fill(phrase, numbers), _fill(expression, numbers)))
    return drawn


def _fill(
    text: str,
    numbers: Mapping[str, int],
) -> str:
    for name, value in numbers.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def _draw_arguments(
    kind: _Kind,
    rng: random.Random,
) -> list[Any]:
    """Return distinct arguments: those of the tests, and one more for the question."""
    arguments: dict[str, Any] = {}
    while len(arguments) < NUM_TESTS + 1:
        argument = kind.draw(rng)
        arguments[json.dumps(argument)] = argument
    return list(arguments.values())


def _write_program(steps: Sequence[tuple[str, str]]) -> str:
    *body, (_, result) = steps
    return "\n".join(
        [
            "def solve(x):",
            *(f"    x = {expression}" for _, expression in body),
            f"    return {result}",
        ]
    )


def _run_reference(
    program: str,
    arguments: Sequence[Any],
) -> list[str]:
    space: dict[str, Any] = {}
    exec(program, space)  # noqa: S102 - our own expressions and numbers, nobody else's
    return [json.dumps(space["solve"](argument)) for argument in arguments]


def _write_question(
    kind: _Kind,
    steps: Sequence[tuple[str, str]],
    example: Any,
    result: str,
) -> str:
    lines = [f"{number}. {phrase}" for number, (phrase, _) in enumerate(steps, 1)]
    return (
        f"Write a Python function solve(x). Its argument x is {kind.argument}. It does these steps"
        " in this order:\n"
        + "\n".join(lines)
        + f"\nFor example, solve({example!r}) returns {json.loads(result)!r}.\n"
        "Your answer is the code of the function and nothing else."
    )
