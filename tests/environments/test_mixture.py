"""The mix of families and their levels, with a source that costs nothing."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.groups import scored_group
from worker import settings
from worker.environments import mixture
from worker.environments.mixture import MAX_INDEX, Mix, config_digest
from worker.environments.source import Config, Recipe
from worker.errors import BadRecord, SettingsError, TrainingError
from worker.records import MAX_PART_TASKS, Task


class Numbers:
    """A source whose families have as many levels as their names say: `three3`."""

    version = "numbers 1"

    def version_of(self, family: str) -> str:
        return f"{self.version} {family}"

    def check(self, family: str, config: Config) -> None:
        if family.startswith("bad"):
            raise SettingsError(f"environment.families: {family}: unknown")

    def levels(self, family: str, config: Config) -> Sequence[Config]:
        return [{"level": level, **config} for level in range(int(family[-1]))]

    def question(self, recipe: Recipe) -> str:
        return f"{recipe.family} {json.loads(recipe.config)} {recipe.seed}"

    def answer(self, recipe: Recipe) -> str | None:
        return str(recipe.seed)

    def score(self, recipe: Recipe, completions: Sequence[str]) -> list[float]:
        return [float(completion == str(recipe.seed)) for completion in completions]


def mix(*families: dict[str, Any]) -> Mix:
    named = [
        {"name": f"n/{family.pop('name', 'one3')}", **family} for family in map(dict, families)
    ]
    section = settings.parse({"environment": {"families": named}}, "test").environment
    return Mix(section, {"n": Numbers()})


def groups(found: Mix, count: int, *rewards: float, family: str = "n/one3") -> list[Any]:
    """Return groups of a family at its present level."""
    level = found.levels.get(family)
    tasks = found.tasks_of(family, level, 7, count)
    return [scored_group(task, "?", ["a"] * len(rewards), rewards) for task in tasks]


def learn(found: Mix, count: int, *rewards: float) -> int:
    """Learn groups one a round; return the level afterwards."""
    for _ in range(count):
        found.learn(groups(found, 1, *rewards))
    return found.levels["n/one3"]


@hypothesis_settings(max_examples=30, deadline=None, database=None)
@given(seed=st.integers(0, 2**63), count=st.integers(0, 30), part=st.integers(0, 5))
def test_tasks_of_a_part_are_the_same_again_and_the_first_of_more(
    seed: int, count: int, part: int
) -> None:
    families = ({"name": "one3", "weight": 3.0}, {"name": "two0"})
    tasks = mix(*families).sample(seed, count, part)
    assert tasks == mix(*families).sample(seed, count, part)
    assert mix(*families).sample(seed, count + 1, part)[:count] == tasks
    assert [task.index for task in tasks] == [part * MAX_PART_TASKS + n for n in range(count)]
    assert {task.seed for task in tasks} <= {seed}


def test_families_are_drawn_by_their_weights() -> None:
    found = mix({"name": "one3", "weight": 3.0}, {"name": "two3", "weight": 1.0})
    counts = Counter(task.family for task in found.sample(1, 1000))
    assert 650 < counts["n/one3"] < 850
    assert sum(counts.values()) == 1000


@pytest.mark.parametrize(
    ("count", "part", "most"),
    [(-1, 0, MAX_INDEX), (MAX_INDEX + 1, 0, MAX_INDEX), (MAX_PART_TASKS + 1, 1, MAX_PART_TASKS)],
)
def test_number_of_tasks_is_bounded(count: int, part: int, most: int) -> None:
    with pytest.raises(SettingsError) as refused:
        mix({}).sample(1, count, part)
    assert str(refused.value) == f"tasks_per_round: got {count}; expected at most {most}"


def test_task_is_made_and_scored_from_its_recipe() -> None:
    found = mix({"level": 1})
    (task,) = found.sample(5, 1)
    answer = found.answer(task)
    assert answer is not None
    assert found.question(task).startswith("one3 {'level': 1}")
    assert found.score(task, [answer, "x", ""]) == [1.0, 0.0, 0.0]
    assert found.level_of(task) == 1


def test_tasks_of_one_seed_differ_and_do_not_depend_on_the_family() -> None:
    found = mix({"name": "two0"})
    seeds = {found.answer(task) for task in found.sample(5, 50)}
    assert len(seeds) == 50


@pytest.mark.parametrize(
    "change",
    [
        {"family": "n/two3"},
        {"family": "one3"},
        {"config_digest": "0" * 12},
        {"config_digest": ""},
        {"index": -1},
        {"index": MAX_INDEX},
        {"index": 10**30},
    ],
)
def test_recipe_of_another_mix_is_an_unknown_task(change: dict[str, Any]) -> None:
    found = mix({})
    (task,) = found.sample(5, 1)
    fields = {name: getattr(task, name) for name in ("family", "config_digest", "seed", "index")}
    other = Task(**fields | change)
    for ask in (found.question, found.answer, lambda task: found.score(task, ["x"])):
        with pytest.raises(BadRecord) as refused:
            ask(other)
        assert refused.value.reason == "unknown-task"
    assert found.level_of(other) is None


def test_last_recipe_of_a_seed_is_known() -> None:
    found = mix({})
    (task,) = found.sample(5, 1)
    last = Task(task.family, task.config_digest, task.seed, MAX_INDEX - 1)
    assert found.question(last) != found.question(task)


def test_peer_at_another_level_is_understood() -> None:
    ours, theirs = mix({"level": 0}), mix({"level": 2})
    (task,) = theirs.sample(3, 1)
    assert ours.question(task) == theirs.question(task)
    assert ours.level_of(task) == 2


def test_digest_depends_on_version_family_and_configuration_only() -> None:
    base = config_digest("v1", "f", {"a": 1, "b": [2]})
    assert config_digest("v1", "f", {"b": [2], "a": 1}) == base
    others = [
        config_digest("v2", "f", {"a": 1, "b": [2]}),
        config_digest("v1", "g", {"a": 1, "b": [2]}),
        config_digest("v1", "f", {"a": 1, "b": [3]}),
        config_digest("v1", "f", {"a": 1}),
    ]
    assert len({base, *others}) == 5
    assert all(len(digest) == 12 for digest in others)


@pytest.mark.parametrize(
    ("families", "message"),
    [
        (({}, {}), "a family is listed twice with the same configuration; list it once"),
        (({"level": 3},), "n/one3: level 3; expected 0 to 2, its curriculum's"),
        (({"name": "two0", "level": 0},), "n/two0: level 0; expected none: it has no curriculum"),
        (({"name": "bad1"},), "bad1: unknown"),
    ],
)
def test_mix_that_can_not_be_is_refused(families: tuple[dict[str, Any], ...], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        mix(*families)
    assert str(refused.value).endswith(message)


def test_one_family_with_two_configurations_is_two_entries() -> None:
    found = mix({"config": {"max": 1}}, {"config": {"max": 2}})
    assert found.names == ("n/one3",)
    assert len(set(found.families)) == 2


def test_auto_without_a_curriculum_has_no_level() -> None:
    found = mix({"name": "two0", "level": "auto"})
    assert found.levels == {}
    (task,) = found.sample(1, 1)
    assert found.level_of(task) is None


def test_tasks_of_a_family_and_level() -> None:
    found = mix({"level": 1}, {"name": "two0"})
    assert [found.level_of(task) for task in found.tasks_of("n/one3", 2, 9, 3)] == [2, 2, 2]
    assert {found.level_of(task) for task in found.tasks_of("n/one3", None, 9, 2)} == {None}
    assert [task.index for task in found.tasks_of("n/two0", None, 9, 2)] == [0, 1]
    with pytest.raises(SettingsError, match=r"no n/x; expected one of n/one3, n/two0"):
        found.tasks_of("n/x", None, 9, 1)
    for level in (-1, 3):
        with pytest.raises(SettingsError, match=f"n/one3: level {level}; expected 0 to 2"):
            found.tasks_of("n/one3", level, 9, 1)


def test_easy_tasks_take_the_families_in_turn_at_their_easiest_level() -> None:
    found = mix({"level": 2}, {"name": "two0"})
    tasks = found.easy_tasks(4, 5)
    assert [task.family for task in tasks] == ["n/one3", "n/two0", "n/one3", "n/two0", "n/one3"]
    assert [found.level_of(task) for task in tasks] == [0, None, 0, None, 0]


@pytest.mark.parametrize(
    ("count", "mean", "level"),
    [(3, 1.0, 1), (2, 1.0, 0), (3, 0.9, 0), (10, 0.7, 1), (9, 0.7, 0), (20, 0.69, 0)],
)
def test_auto_rises_after_three_solved_groups_or_ten_good_ones(
    count: int, mean: float, level: int
) -> None:
    assert learn(mix({"level": "auto"}), count, mean, mean) == level


def test_level_stops_at_the_last_one() -> None:
    assert learn(mix({"level": "auto"}), 50, 1.0, 1.0) == 2


def test_fixed_level_moves_only_with_rise_at() -> None:
    assert learn(mix({"level": 0}), 30, 1.0, 1.0) == 0
    assert learn(mix({"level": 0, "rise_at": 0.5}), 9, 0.5, 0.5) == 0
    assert learn(mix({"level": 0, "rise_at": 0.5}), 10, 0.5, 0.5) == 1


def test_level_falls_where_nothing_is_learned_but_not_below_that_of_the_settings() -> None:
    found = mix({"level": "auto"})
    assert learn(found, 6, 1.0, 1.0) == 2
    assert learn(found, 5, 0.0, 0.0) == 2
    assert learn(found, 1, 0.0, 0.0) == 1
    assert learn(found, 30, 0.0, 0.0) == 0
    floor = mix({"level": 1, "rise_at": 0.5})
    assert learn(floor, 10, 1.0, 1.0) == 2
    assert learn(floor, 30, 0.0, 0.0) == 1


@pytest.mark.parametrize("rewards", [(0.0, 1.0), (0.2, 0.2)])
def test_level_with_a_signal_or_some_reward_does_not_fall(rewards: tuple[float, ...]) -> None:
    found = mix({"level": "auto"})
    learn(found, 3, 1.0, 1.0)
    assert learn(found, 30, *rewards) == 1


def test_level_rises_more_slowly_after_each_fall() -> None:
    found = mix({"level": "auto"})
    learn(found, 3, 1.0, 1.0)
    learn(found, 6, 0.0, 0.0)
    assert found.levels["n/one3"] == 0
    assert learn(found, 19, 1.0, 1.0) == 0
    assert learn(found, 1, 1.0, 1.0) == 1


def test_groups_of_another_level_or_family_teach_nothing_about_this_one() -> None:
    found = mix({"level": "auto"}, {"name": "two3", "level": "auto"})
    of_level_2 = [
        scored_group(task, "?", ["a"] * 2, [1.0, 1.0]) for task in found.tasks_of("n/one3", 2, 7, 9)
    ]
    found.learn(of_level_2)
    assert found.levels == {"n/one3": 0, "n/two3": 0}
    found.learn(groups(found, 3, 1.0, 1.0, family="n/two3"))
    assert found.levels == {"n/one3": 0, "n/two3": 1}


def test_family_that_teaches_is_drawn_more_often_and_none_is_given_up() -> None:
    found = mix({"level": "auto"}, {"name": "two3", "level": "auto"})
    for _ in range(mixture.DRAWN_BY):
        found.learn(groups(found, 1, 0.0, 1.0) + groups(found, 1, 0.0, 0.0, family="n/two3"))
    counts = Counter(task.family for task in found.sample(3, 1000))
    assert counts["n/one3"] > 5 * counts["n/two3"] > 0


@hypothesis_settings(max_examples=30, deadline=None, database=None)
@given(
    rewards=st.lists(st.sampled_from([(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.7, 0.8)]), max_size=40)
)
def test_state_restores_everything(rewards: list[tuple[float, float]]) -> None:
    before, after = mix({"level": "auto"}), mix({"level": "auto"})
    for each in rewards:
        before.learn(groups(before, 1, *each))
    after.resume(json.loads(json.dumps(before.state())))
    assert after.state() == before.state()
    assert after.sample(9, 20) == before.sample(9, 20)
    assert 0 <= after.levels["n/one3"] <= 2


def test_state_of_other_families_is_named_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    before = mix({"level": "auto"}, {"name": "two3", "level": "auto"})
    learn(before, 3, 1.0, 1.0)
    after = mix({"level": "auto"}, {"name": "four4", "level": 2})
    with caplog.at_level(logging.WARNING):
        after.resume(before.state())
    assert after.levels == {"n/one3": 1, "n/four4": 2}
    assert (
        "level not restored, starting as the settings say family='n/two3 {}' level=0" in caplog.text
    )


@pytest.mark.parametrize("level", [-1, 3, 10**9])
def test_level_that_is_not_there_is_left_out(level: int, caplog: pytest.LogCaptureFixture) -> None:
    found = mix({"level": "auto"})
    with caplog.at_level(logging.WARNING):
        found.resume({"n/one3 {}": {"level": level}})
    assert found.levels == {"n/one3": 0}
    assert f"level={level}" in caplog.text


@pytest.mark.parametrize(
    "state",
    [
        {"n/one3 {}": None},
        {"n/one3 {}": {}},
        {"x": {"level": "1"}},
        {"x": {"level": 1, "rewards": 7}},
    ],
)
def test_state_of_another_form_is_a_training_error(state: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="levels of the environment: "):
        mix({"level": "auto"}).resume(state)


def test_versions_are_those_of_the_sources() -> None:
    assert mix({}).versions == ("numbers 1",)
