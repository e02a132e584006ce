"""Problems of games, from tasks and from files."""

import json
import re

import pytest

from worker import environments, settings
from worker.environments.answers import tagged
from worker.environments.presets import DEMO_FAMILIES
from worker.errors import SettingsError
from worker.judge import problems

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


def test_file_of_problems_is_read_in_turn(tmp_path):
    file = tmp_path / "problems.jsonl"
    lines = [{"clues": ["x"], "choices": ["a", "b"], "answer": i} for i in (0, 1)]
    file.write_text("\n".join(map(json.dumps, lines)))
    section = JUDGE.model_copy(update={"problems_file": file})
    found = problems.source(section, lambda: pytest.fail("not needed"))
    assert [next(found).answer for _ in range(3)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"clues": ["x"], "choices": ["a", "b"], "answer": 2}', "answer is 2, and there are 2"),
        ('{"clues": ["x"], "choices": ["a", "a"], "answer": 0}', "a choice is there twice"),
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
