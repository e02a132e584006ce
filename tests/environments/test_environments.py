"""Environments are found by module name; an example of a new environment and its test."""

import pytest

from worker import environments, settings
from worker.errors import SettingsError

DOUBLING = """
import json

from worker.environments.answers import extract_answer


class Doubling:
    version = "doubling 1"

    def version_of(self, family):
        return self.version

    def check(self, family, config):
        pass

    def levels(self, family, config):
        return [{"max": 9}, {"max": 99}]

    def question(self, recipe):
        return f"What is twice {recipe.seed % json.loads(recipe.config).get('max', 9)}?"

    def answer(self, recipe):
        return str(2 * (recipe.seed % json.loads(recipe.config).get("max", 9)))

    def score(self, recipe, completions):
        right = self.answer(recipe)
        return [float(extract_answer(completion) == right) for completion in completions]


SOURCE = Doubling
"""


@pytest.fixture
def with_doubling(tmp_path, monkeypatch):
    (tmp_path / "doubling_numbers.py").write_text(DOUBLING)
    monkeypatch.setattr(environments, "__path__", [*environments.__path__, str(tmp_path)])


def load(*names: str) -> environments.Environment:
    families = tuple(settings.Family(name=name, level=0) for name in names)
    return environments.load(settings.Environment(families=families))


@pytest.mark.usefixtures("with_doubling")
def test_a_module_with_a_source_is_an_environment():
    mix = load("doubling-numbers/small", "gcd")
    tasks = [task for task in mix.sample(7, 20) if task.family == "doubling-numbers/small"]
    assert tasks
    assert "doubling 1" in mix.versions
    for task in tasks:
        assert mix.question(task).startswith("What is twice ")
        assert mix.score(task, [f"<answer>{mix.answer(task)}</answer>", "<answer>x</answer>"]) == [
            1.0,
            0.0,
        ]


@pytest.mark.usefixtures("with_doubling")
def test_parts_of_a_round_have_tasks_of_their_own_that_do_not_depend_on_each_other():
    mix = load("doubling-numbers/small", "gcd")
    parts = [mix.sample(7, 9, part) for part in (0, 1, 255)]
    assert [[task.index for task in tasks] for tasks in parts] == [
        list(range(first, first + 9)) for first in (0, 256, 65280)
    ]
    assert mix.sample(7, 3, 1) == parts[1][:3]
    families = [[task.family for task in tasks] for tasks in parts]
    assert families[0] != families[1]
    for tasks in parts:
        for task in tasks:
            assert mix.question(task)
    with pytest.raises(SettingsError, match="got 257; expected at most 256"):
        mix.sample(7, 257, 1)


@pytest.mark.parametrize("name", ["poetry", "answers", "", "code.sandbox"])
def test_any_other_name_is_a_settings_error(name):
    with pytest.raises(SettingsError) as caught:
        load(f"{name}/sonnets")
    before, expected, after = str(caught.value).partition("code/, ")
    assert before.startswith(f"environment.families: {name}/: no such environment; expected ")
    assert expected
    assert after.endswith("or a family of reasoning-gym")
