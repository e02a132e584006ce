"""Problems of games, from tasks and from files."""

import json
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import environments, settings
from worker.environments.answers import tagged
from worker.environments.presets import DEMO_FAMILIES
from worker.errors import SettingsError
from worker.judge import problems
from worker.judge.past_games import FILE, PastGames
from worker.records import Task

JUDGE = settings.Judge(rounds=3, choices=4)


@pytest.fixture(scope="module")
def environment():
    return environments.load(settings.Environment(families=DEMO_FAMILIES))


def test_one_choice_is_right_and_clues_grow(environment):
    found = [problems.of_seed(environment, JUDGE, seed) for seed in range(20)]
    made = [(seed, problem) for seed, problem in enumerate(found) if problem is not None]
    assert len(made) >= 15
    for seed, problem in made:
        (task,) = environment.sample(seed, 1)
        rewards = environment.score(task, [tagged(choice) for choice in problem.choices])
        assert [i for i, reward in enumerate(rewards) if reward > 0.99] == [problem.answer]
        assert len(problem.clues) == 3
        assert problem.clues[-1] == environment.question(task)
        for clue in problem.clues[:-1]:
            assert problem.clues[-1].startswith(clue.removesuffix(" ..."))
        assert len(set(problem.choices)) == 4
    assert len({problem.answer for _, problem in made}) > 1


def test_drawn_problems_differ(environment):
    drawn = problems.source(JUDGE, lambda: environment)
    assert len({next(drawn).clues[-1] for _ in range(10)}) > 5


def test_problem_of_a_file_is_asked_once_also_after_a_restart(tmp_path, caplog):
    """Its answer is public once the game has ended, and in the games of earlier versions."""
    file, folder = tmp_path / "problems.jsonl", tmp_path / "judge"
    section = JUDGE.model_copy(update={"problems_file": file, "state_dir": folder})

    def write(*names: str) -> None:
        lines = [{"clues": [name], "choices": ["a", "b"], "answer": 1} for name in names]
        file.write_text("\n".join(map(json.dumps, lines)))

    def asked() -> Iterator[str]:
        found = problems.source(section, lambda: pytest.fail("not needed"))
        return (problem.clues[0] for problem in found)

    write("one", "two", "three", "four")
    PastGames(folder / FILE).add({"game": 0, "clues": ["two"], "choices": ["b", "a"], "answer": 0})
    assert next(asked()) == "one"
    assert next(asked()) == "three"
    write("new", "one", "two", "three", "four")
    assert list(asked()) == ["new", "four"]
    assert "all 5 problems of" in caplog.text
    assert list(asked()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"clues": ["x"], "choices": ["a", "b"], "answer": 2}', "answer is 2, and there are 2"),
        ('{"clues": ["x"], "choices": ["a", "a"], "answer": 0}', "a choice occurs twice"),
        ('{"clues": [], "choices": ["a", "b"], "answer": 0}', "line 1: clues"),
        ("{", "line 1"),
        ("", "is empty"),
    ],
)
def test_wrong_file_is_named_with_its_line(tmp_path, line, message):
    file = tmp_path / "problems.jsonl"
    file.write_text(line)
    with pytest.raises(SettingsError, match=re.escape(message)):
        problems.read(file)


def test_text_with_any_separator_is_one_line(tmp_path):
    file = tmp_path / "problems.jsonl"
    clue = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    problem = {"clues": [clue], "choices": ["a", "b\u2028"], "answer": 0, "family": "x"}
    line = json.dumps(problem, ensure_ascii=False)
    for end in ("", "\n"):
        file.write_text(f"{line}\n{line}{end}")
        found = problems.read(file)
        assert [one.clues for one in found] == [(clue,)] * 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{good}\n\n{good}\n", "line 2: "),
        ("{good}\n{good}\n\n", "line 3: "),
        ("{good}\nnot JSON", "line 2: "),
        ("[]", "line 1: "),
        ("{good}\n" + '{{"clues": ["x"], "choices": ["a"], "answer": 0}}', "line 2: choices: "),
        ('{{"clues": [""], "choices": ["a", "b"], "answer": 0}}', "line 1: clues/0: "),
        ('{{"clues": ["x"], "choices": ["a", "b"], "answer": -1}}', "line 1: answer: "),
        ('{{"clues": ["x"], "choices": ["a", "b"], "answer": 0, "x": 1}}', "line 1: x: "),
        ('{{"clues": ["x"], "choices": ["a", ""], "answer": 0}}', "line 1: choices/1: "),
    ],
)
def test_first_mistake_of_a_file_is_named(tmp_path, text, reason):
    file = tmp_path / "problems.jsonl"
    file.write_text(text.format(good='{"clues": ["x"], "choices": ["a", "b"], "answer": 0}'))
    with pytest.raises(SettingsError) as refusal:
        problems.read(file)
    assert str(refusal.value).startswith(f"{file} (judge.problems_file): {reason}")
    assert str(refusal.value).endswith("; expected an object with clues, choices and answer")


def test_file_that_is_missing_or_of_something_else_is_named(tmp_path):
    for file, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(SettingsError, match=rf"can't be read: .*{reason}"):
            problems.read(file)
    (tmp_path / "image").write_bytes(b"\x89PNG\xff")
    with pytest.raises(SettingsError, match=r"can't be read: .*; expected one problem per line"):
        problems.read(tmp_path / "image")


@pytest.mark.parametrize(
    ("field", "longest"),
    [("clues", ["x" * 20_000] * 64), ("choices", [f"{n:0200d}" for n in range(64)])],
)
def test_largest_problem_is_taken_and_a_larger_one_refused(field, longest):
    small = {"clues": ["x"], "choices": ["a", "b"], "answer": 0}
    problems.Problem.model_validate(small | {field: longest})
    for larger in ([*longest, "y"], [longest[0] + "x", *longest[1:]]):
        with pytest.raises(ValueError, match="at most"):
            problems.Problem.model_validate(small | {field: larger})


def test_same_seed_makes_the_same_problem(environment):
    for seed in range(5):
        first = problems.of_seed(environment, JUDGE, seed)
        assert first == problems.of_seed(environment, JUDGE, seed)


@given(st.text(min_size=8, max_size=60), st.integers(1, 8))
def test_clues_of_any_question_grow_to_the_whole(question, parts):
    clues = [problems._beginning(question, part, parts) for part in range(1, parts + 1)]
    assert clues[-1] == question
    for clue in clues[:-1]:
        assert clue.endswith(" ...")
        assert question.startswith(clue.removesuffix(" ..."))
        assert len(clue.removesuffix(" ...")) < len(question)
    assert [len(clue) for clue in clues[:-1]] == sorted(len(clue) for clue in clues[:-1])


@pytest.mark.parametrize(
    ("answer", "is_choice"),
    [
        ("7", True),
        ("x" * 200, True),
        ("x" * 201, False),
        ("", False),
        (" 7", False),
        ("7\n", False),
    ],
)
def test_choices_are_short_and_without_spaces_around_them(answer, is_choice):
    assert problems._is_choice(answer) == is_choice


def test_environment_without_short_answers_is_named():
    class Endless:
        names = ("proofs",)

        def sample(self, seed, count):
            return [Task("proofs", "0" * 16, seed, 0)] * count

        def answer(self, task):
            return "x" * 201

        def question(self, task):
            return "Why, in many words?"

    drawn = problems.source(JUDGE, Endless)
    with pytest.raises(SettingsError, match=r"none of 64 tasks of proofs has 4 different short"):
        next(drawn)
