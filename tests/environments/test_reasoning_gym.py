import dataclasses
import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.groups import scored_group
from worker import environments, settings
from worker.environments.answers import extract_answer
from worker.environments.mixture import MAX_INDEX, Mix, config_digest
from worker.environments.presets import DEMO_FAMILIES, DEMO_SETTINGS
from worker.environments.reasoning_gym import ReasoningGym, _make_item
from worker.errors import BadRecord, SettingsError, TrainingError
from worker.records import ScoredGroup
from worker.settings import Family


def gym(*families: Family) -> Mix:
    return Mix(settings.Environment(families=families), {"reasoning-gym": ReasoningGym()})


@pytest.fixture(scope="module")
def default() -> Mix:
    return gym(*settings.Environment().families)


def test_default_mix_makes_nine_families_and_scores_their_own_answers(default):
    tasks = default.sample(1, 200)
    assert {t.family for t in tasks} == set(settings.DEFAULT_FAMILIES)
    for task in tasks[:60]:
        answer = default.answer(task)
        if answer is not None:
            assert default.score(task, [f"so: <answer>{answer}</answer>", answer]) == [1.0, 0.0]


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_tasks_and_scores_are_the_same_in_another_process(default, hash_seed):
    code = (
        "import json; from worker import settings, environments\ne ="
        " environments.load(settings.Environment())\nprint(json.dumps([[t.family, t.config_digest,"
        " t.seed, t.index, e.question(t), e.answer(t), e.score(t, ['<answer>1</answer>', '<answer>0"
        " 1</answer>'])] for t in e.sample(7, 60)]))"
    )
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={"PYTHONHASHSEED": hash_seed},
    ).stdout
    texts = ["<answer>1</answer>", "<answer>0 1</answer>"]
    assert json.loads(output) == [
        [*dataclasses.astuple(t), default.question(t), default.answer(t), default.score(t, texts)]
        for t in default.sample(7, 60)
    ]


def test_neighbouring_seeds_share_no_task():
    mix = gym(Family(name="basic_arithmetic"))
    questions = [mix.question(t) for seed in range(5) for t in mix.sample(seed, 20)]
    assert len(set(questions)) == 100


def test_threads_that_make_tasks_leave_standard_output_alone():
    mix, stdout = gym(Family(name="bf")), sys.stdout
    tasks = mix.sample(11, 200)
    with ThreadPoolExecutor(8) as pool:
        questions = list(pool.map(mix.question, tasks))
    assert sys.stdout is stdout
    _make_item.cache_clear()
    assert questions == [mix.question(task) for task in tasks]


def test_families_are_drawn_by_weight():
    mix = gym(Family(name="gcd", weight=3.0), Family(name="lcm", weight=1.0))
    names = [t.family for t in mix.sample(3, 2000)]
    assert 1400 < names.count("gcd") < 1600


def test_question_of_a_task_that_this_node_does_not_have_is_refused(default):
    task = default.sample(1, 1)[0]
    for change in (
        {"family": "sudoku"},
        {"config_digest": "0" * 12},
        {"index": MAX_INDEX},
        {"index": -1},
    ):
        wrong = dataclasses.replace(task, **change)
        for call in (lambda t=wrong: default.question(t), lambda t=wrong: default.score(t, ["x"])):
            with pytest.raises(BadRecord) as caught:
                call()
            assert caught.value.reason == "unknown-task"


def test_digest_changes_with_config_and_version_only():
    digest = config_digest("x 1", "gcd", {"min_value": 1, "max_value": 9})
    assert digest == config_digest("x 1", "gcd", {"max_value": 9, "min_value": 1})
    assert digest not in (
        config_digest("x 1", "gcd", {}),
        config_digest("x 2", "gcd", {"min_value": 1, "max_value": 9}),
    )
    mixes = [gym(Family(name="gcd", weight=weight)) for weight in (1.0, 2.0)]
    assert mixes[0].sample(1, 1) == mixes[1].sample(1, 1)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>4</answer>", "4"),
        ("<answer>1</answer> no: <answer> 2\n</answer>", "2"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("<answer>1</answer><answer>2", "1"),
        ("<answer></answer>", ""),
        ("4", None),
        ("</answer>4<answer>", None),
        ("", None),
    ],
)
def test_answer_is_the_text_of_the_last_pair(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            Family(name="basic_aritmetic"),
            "basic_aritmetic: not a family of reasoning-gym .*; did you mean basic_arithmetic?",
        ),
        (
            Family(name="zzzz"),
            "zzzz: not a family of reasoning-gym .*; reasoning-gym's gallery lists them",
        ),
        (
            Family(name="countdown"),
            "countdown: refused: its scorer evaluates the answer, which may come from",
        ),
        (
            Family(name="composite"),
            "composite: refused: it mixes other families; name those with weights",
        ),
        (Family(name="gcd", config={"seed": 4}), "gcd: seed follows from the task; leave it out"),
        (
            Family(name="gcd", config={"nonsense": 4}),
            'gcd: {"nonsense": 4}: reasoning-gym refuses it: .*nonsense',
        ),
        (
            Family(name="gcd", config={"min_value": 0}),
            "gcd: .*: reasoning-gym refuses it: min_value",
        ),
        (Family(name="gcd", level=4), "gcd: level 4; expected 0 to 3, its curriculum's"),
        (Family(name="acre", level=0), "acre: level 0; expected none: it has no curriculum"),
    ],
)
def test_wrong_family_is_a_settings_error(family, message):
    with pytest.raises(SettingsError, match=message):
        gym(family)


def test_rise_without_a_level_is_a_settings_error():
    with pytest.raises(SettingsError, match="rise_at needs a level to rise from"):
        settings.parse({"environment": {"families": [{"name": "gcd", "rise_at": 0.5}]}}, "test")


def test_same_family_twice_is_a_settings_error():
    with pytest.raises(SettingsError, match="listed twice"):
        gym(Family(name="gcd"), Family(name="gcd", weight=2.0))


def test_answer_that_a_scorer_can_not_read_is_wrong():
    mix = gym(
        Family(name="prime_factorization"), Family(name="game_of_life"), Family(name="coin_flip")
    )
    for task in mix.sample(0, 12):
        assert (
            mix.score(
                task, ["<answer>abc</answer>", "<answer>{}</answer>", "<answer>1e999</answer>"]
            )
            == [0.0] * 3
        )


def test_peer_s_answer_is_never_evaluated(tmp_path):
    mark = tmp_path / "mark"
    text = f"<answer>__import__('pathlib').Path({str(mark)!r}).touch()</answer>"
    mix = gym(
        *(
            Family(name=n)
            for n in ("binary_matrix", "spiral_matrix", "string_insertion", "n_queens")
        )
    )
    for task in mix.sample(0, 40):
        mix.score(
            task, [text, text.replace("<answer>", "<answer>[").replace("</answer>", "]</answer>")]
        )
    assert not mark.exists()


def test_evaluating_scorers_still_read_a_literal():
    mix = gym(Family(name="binary_matrix"))
    task = mix.sample(0, 1)[0]
    rows = [[int(x) for x in line.split()] for line in mix.answer(task).splitlines()]
    assert mix.score(task, [f"<answer>{rows}</answer>"])[0] > 0


def test_long_and_hostile_answers_are_scored_in_no_time(default):
    texts = [
        f"<answer>{body}</answer>"
        for body in ("(" * 8000, "9" * 16000, "¬" * 16000, "[" * 16000, "\x00\x1b[2J")
    ]
    for task in default.sample(2, 30):
        assert all(0 <= reward <= 0.5 for reward in default.score(task, texts))


def test_demo_settings_are_a_mix_that_loads():
    checked = settings.from_flat(DEMO_SETTINGS, "demo")
    assert checked.environment.families == DEMO_FAMILIES
    assert len(environments.load(checked.environment).sample(1, 8)) == 8


def test_levels_get_harder_and_config_stands_above_them():
    easy, hard = gym(Family(name="chain_sum", level=0)), gym(Family(name="chain_sum", level=9))
    lengths = [max(len(mix.question(t)) for t in mix.sample(1, 20)) for mix in (easy, hard)]
    assert lengths[1] > lengths[0] + 20
    fixed = gym(Family(name="chain_sum", level=9, config={"min_terms": 2, "max_terms": 2}))
    assert all(
        fixed.question(t).count("+") + fixed.question(t).count(" - ") <= 1
        for t in fixed.sample(1, 10)
    )


def test_peers_at_different_levels_understand_each_other():
    """They do at any level, or at none; only another configuration is unknown."""
    mixes = [gym(Family(name="gcd", level=level)) for level in (None, 0, 3)]
    for mix in mixes:
        task = mix.sample(5, 1)[0]
        assert len({other.question(task) for other in mixes}) == 1
        assert all(
            other.score(task, [f"<answer>{mix.answer(task)}</answer>"]) == [1.0] for other in mixes
        )
    assert len({mix.sample(5, 1)[0].config_digest for mix in mixes}) == 3
    with pytest.raises(BadRecord, match="not in this node's mix"):
        gym(Family(name="gcd", config={"max_value": 7, "min_value": 1})).question(
            mixes[0].sample(5, 1)[0]
        )


def scored(mix: Mix, seed: int, reward: float) -> list[ScoredGroup]:
    return [scored_group(task, "?", ("a", "b"), (reward, reward)) for task in mix.sample(seed, 5)]


@pytest.mark.parametrize("name", ["power_function", "tsumego", "modulo_grid", "sokoban", "bf"])
def test_odd_curricula_load(name):
    """Some configurations check nothing, or have levels that are refused or take forever."""
    mix = gym(Family(name=name))
    started = time.monotonic()
    assert mix.score(mix.sample(1, 1)[0], ["<answer>abc</answer>"]) in ([0.0], [0.01])
    top = {"power_function": 0, "tsumego": 0, "modulo_grid": 0, "bf": 1}.get(name)
    if top is not None:
        hard = gym(Family(name=name, level=top))
        hard.question(hard.sample(1, 1)[0])
    assert time.monotonic() - started < 10
    with pytest.raises(SettingsError, match="curriculum"):
        gym(Family(name=name, level=20))


def test_level_rises_with_success_and_not_before():
    mix = gym(Family(name="gcd", level=2, rise_at=0.8))
    mix.learn(scored(mix, 1, 0.9))
    assert mix.levels == {"gcd": 2}
    old = scored(mix, 2, 0.9)
    mix.learn(old)
    assert mix.levels == {"gcd": 3}
    mix.learn(old)  # of the level before: it says nothing about this one
    for seed in range(5):
        mix.learn(scored(mix, seed, 1.0))
    assert mix.levels == {"gcd": 3}  # the highest


def test_level_stays_without_success_and_without_rise_at():
    for family in (Family(name="gcd", level=0, rise_at=0.8), Family(name="gcd", level=0)):
        mix = gym(family)
        for seed in range(6):
            mix.learn(scored(mix, seed, 0.79 if family.rise_at else 1.0))
        assert mix.levels == {"gcd": 0}


def test_curriculum_goes_on_where_it_stood(caplog):
    family = Family(name="gcd", level=0, rise_at=0.5)
    before, after = gym(family), gym(family)
    for seed in range(3):
        before.learn(scored(before, seed, 0.6))
    state = json.loads(json.dumps(before.state()))
    after.resume(state)
    assert (after.state(), after.levels) == (before.state(), {"gcd": 1})
    for mix in (before, after):
        mix.learn(scored(mix, 9, 1.0))
    assert after.sample(3, 5) == before.sample(3, 5)
    other = gym(Family(name="gcd", level=0, config={"max_numbers": 3}))
    other.resume(state)  # another family than then: it begins where the settings say
    assert other.levels == {"gcd": 0}
    assert "level not restored, starting as the settings say family='gcd {}' level=1" in caplog.text


def test_level_survives_an_upgrade_of_the_environment(monkeypatch):
    before = gym(Family(name="gcd", level=2))
    digest = before.sample(1, 1)[0].config_digest
    monkeypatch.setattr(ReasoningGym, "version", "reasoning-gym 99")
    after = gym(Family(name="gcd", level=0))
    assert gym(Family(name="gcd", level=2)).sample(1, 1)[0].config_digest != digest
    after.resume(before.state())
    assert after.levels == {"gcd": 2}


def at_level(mix: Mix, seed: int, *rewards: float) -> list[ScoredGroup]:
    return [scored_group(task, "?", ("a",) * len(rewards), rewards) for task in mix.sample(seed, 1)]


def test_auto_begins_at_the_easiest_level_and_rises_at_once_where_tasks_are_solved():
    mix = gym(Family(name="gcd", level="auto"))
    assert mix.levels == {"gcd": 0}
    for seed in range(3):
        mix.learn(at_level(mix, seed, 1.0, 1.0))
    assert mix.levels == {"gcd": 1}
    for seed in range(9):
        mix.learn(at_level(mix, seed, 0.9, 0.7))
    assert mix.levels == {"gcd": 1}
    mix.learn(at_level(mix, 9, 0.9, 0.7))
    assert mix.levels == {"gcd": 2}


def test_auto_falls_where_nothing_is_learned_and_rises_more_slowly_the_next_time():
    mix = gym(Family(name="gcd", level="auto"))
    for seed in range(3):
        mix.learn(at_level(mix, seed, 1.0, 1.0))
    for seed in range(5):
        mix.learn(at_level(mix, seed, 0.0, 0.0))
    mix.learn(at_level(mix, 5, 0.0, 0.4))  # a signal: it stays
    for seed in range(6, 11):
        mix.learn(at_level(mix, seed, 0.0, 0.0))
    assert mix.levels == {"gcd": 1}
    mix.learn(at_level(mix, 11, 0.0, 0.0))
    assert mix.levels == {"gcd": 0}
    for seed in range(40):
        mix.learn(at_level(mix, seed, 0.0, 0.0))
    assert mix.levels == {"gcd": 0}
    for seed in range(13):
        mix.learn(at_level(mix, seed, 1.0, 1.0))
    assert mix.levels == {"gcd": 0}
    after = gym(Family(name="gcd", level="auto"))
    after.resume(json.loads(json.dumps(mix.state())))
    after.learn(at_level(mix, 13, 1.0, 1.0))  # 14 of the last 20: 0.7
    assert after.levels == {"gcd": 1}


def test_a_level_of_the_settings_falls_back_to_it_and_not_below():
    mix = gym(Family(name="gcd", level=1, rise_at=0.5))
    for seed in range(10):
        mix.learn(at_level(mix, seed, 1.0, 0.5))
    assert mix.levels == {"gcd": 2}
    for seed in range(20):
        mix.learn(at_level(mix, seed, 0.0, 0.0))
    assert mix.levels == {"gcd": 1}


def test_families_that_teach_are_drawn_more_often_and_none_is_given_up():
    mix = gym(
        Family(name="gcd", level="auto"), Family(name="lcm", level="auto"), Family(name="products")
    )
    for seed in range(20):
        for task in mix.sample(seed, 9):
            rewards = (0.0, 1.0) if task.family == "gcd" else (0.0, 0.0)
            mix.learn([scored_group(task, "?", ("a", "b"), rewards)])
    drawn = Counter(task.family for task in mix.sample(1, 3000))
    assert drawn["gcd"] / drawn["lcm"] == pytest.approx(9, rel=0.3)
    assert drawn["products"] / drawn["gcd"] == pytest.approx(10 / 9, rel=0.2)


def test_family_whose_wrong_answers_differ_a_little_is_drawn_seldom():
    mix = gym(Family(name="gcd", level="auto"), Family(name="lcm", level="auto"))
    for seed in range(20):
        for task in mix.sample(seed, 9):
            rewards = (0.0, 1.0) if task.family == "gcd" else (0.01, 0.05)
            mix.learn([scored_group(task, "?", ("a", "b"), rewards)])
    drawn = Counter(task.family for task in mix.sample(1, 3000))
    assert drawn["gcd"] / drawn["lcm"] == pytest.approx(4.2, rel=0.2)


def test_levels_of_the_version_before_are_taken_over():
    mix = gym(Family(name="gcd", level="auto"))
    (name,) = mix.state()
    mix.resume({name: {"level": 2, "rewards": [0.5], "signals": [True, False], "falls": 1}})
    assert mix.levels == {"gcd": 2}
    assert mix.state()[name] == {"level": 2, "rewards": [0.5], "strengths": [], "falls": 1}


def test_auto_without_a_curriculum_is_the_plain_family():
    mix = gym(Family(name="acre", level="auto"))
    assert mix.levels == {}
    assert mix.sample(1, 1) == gym(Family(name="acre")).sample(1, 1)
    mix.learn(at_level(mix, 1, 1.0, 1.0))


def test_tasks_of_a_family_at_a_level_can_be_asked_for():
    mix = gym(Family(name="gcd", level="auto"), Family(name="acre"))
    assert mix.tasks_of("gcd", 2, 5, 1) == gym(Family(name="gcd", level=2)).sample(5, 1)
    assert mix.tasks_of("gcd", None, 5, 1) == gym(Family(name="gcd")).sample(5, 1)
    assert [task.family for task in mix.easy_tasks(5, 3)] == ["gcd", "acre", "gcd"]
    assert mix.easy_tasks(5, 1) == mix.tasks_of("gcd", 0, 5, 1)
    with pytest.raises(SettingsError, match="gcd: level 9; expected 0 to 3"):
        mix.tasks_of("gcd", 9, 5, 1)
    with pytest.raises(SettingsError, match="no lcm; expected one of acre, gcd"):
        mix.tasks_of("lcm", 0, 5, 1)


def test_level_of_a_checkpoint_that_names_entries_by_digest_is_taken_over():
    mix = gym(Family(name="gcd", level=0))
    mix.resume({f"gcd {mix.sample(1, 1)[0].config_digest}": {"level": 3, "rewards": []}})
    assert mix.levels == {"gcd": 3}


@pytest.mark.parametrize("state", [[], {"gcd": 3}, {"gcd x": {"level": "2", "rewards": []}}])
def test_state_that_is_none_is_a_training_error(state):
    with pytest.raises(TrainingError, match="levels of the environment"):
        gym(Family(name="gcd", level=0)).resume(state)
