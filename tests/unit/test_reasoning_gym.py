import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from worker import environments, settings
from worker.environments.mixes import DEMO_FAMILIES, DEMO_SETTINGS
from worker.environments.reasoning_gym import MAX_INDEX, ReasoningGym, _make_item, config_digest, extract_answer
from worker.errors import BadRecord, SettingsError
from worker.settings import Family


def gym(*families: Family) -> ReasoningGym:
    return ReasoningGym(settings.Environment(families=families))


@pytest.fixture(scope="module")
def default() -> ReasoningGym:
    return ReasoningGym(settings.Environment())


def test_default_mix_makes_nine_families_and_scores_their_own_answers(default):
    tasks = default.sample(1, 200)
    assert {t.family for t in tasks} == set(settings.DEFAULT_FAMILIES)
    for task in tasks[:60]:
        answer = default.answer(task)
        if answer is not None:
            assert default.score(task, [f"so: <answer>{answer}</answer>", answer]) == [1.0, 0.0]


def test_tasks_are_the_same_in_another_process(default):
    code = (
        "import json; from worker import settings, environments\n"
        "e = environments.load(settings.Environment())\n"
        "print(json.dumps([[t.family, t.config_digest, t.seed, t.index, e.question(t)] for t in e.sample(7, 30)]))"
    )
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100, check=True
    ).stdout
    ours = [[t.family, t.config_digest, t.seed, t.index, default.question(t)] for t in default.sample(7, 30)]
    assert json.loads(output) == ours


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
    for change in ({"family": "sudoku"}, {"config_digest": "0" * 12}, {"index": MAX_INDEX}, {"index": -1}):
        wrong = dataclasses.replace(task, **change)
        for call in (lambda t=wrong: default.question(t), lambda t=wrong: default.score(t, ["x"])):
            with pytest.raises(BadRecord) as caught:
                call()
            assert caught.value.reason == "unknown-task"


def test_digest_changes_with_config_and_version_only(monkeypatch):
    family = Family(name="gcd", config={"min_value": 1, "max_value": 9})
    same = Family(name="gcd", weight=2.0, config={"max_value": 9, "min_value": 1})
    assert config_digest(family) == config_digest(same)
    assert config_digest(family) != config_digest(Family(name="gcd"))
    before = config_digest(family)
    monkeypatch.setattr("worker.environments.reasoning_gym.VERSION", "0.0.1")
    assert config_digest(family) != before


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
            "basic_aritmetic: not a reasoning-gym .* family; did you mean basic_arithmetic?",
        ),
        (Family(name="zzzz"), "zzzz: not a reasoning-gym .* family; reasoning-gym's gallery lists them"),
        (Family(name="countdown"), "countdown: its scorer evaluates the answer as Python"),
        (Family(name="gcd", config={"seed": 4}), "gcd: seed follows from the task; leave it out"),
        (
            Family(name="gcd", config={"nonsense": 4}),
            'gcd: {"nonsense": 4}: reasoning-gym refuses it: .*nonsense',
        ),
        (Family(name="gcd", config={"min_value": 0}), "gcd: .*: reasoning-gym refuses it: min_value"),
    ],
)
def test_wrong_family_is_a_settings_error(family, message):
    with pytest.raises(SettingsError, match=message):
        gym(family)


def test_same_family_twice_is_a_settings_error():
    with pytest.raises(SettingsError, match="stands there twice"):
        gym(Family(name="gcd"), Family(name="gcd", weight=2.0))


def test_answer_that_a_scorer_can_not_read_is_wrong():
    mix = gym(Family(name="prime_factorization"), Family(name="game_of_life"), Family(name="coin_flip"))
    for task in mix.sample(0, 12):
        assert mix.score(task, ["<answer>abc</answer>", "<answer>{}</answer>", "<answer>1e999</answer>"]) == [0.0] * 3


def test_stranger_s_answer_is_never_evaluated(tmp_path):
    mark = tmp_path / "mark"
    text = f"<answer>__import__('pathlib').Path({str(mark)!r}).touch()</answer>"
    mix = gym(*(Family(name=n) for n in ("binary_matrix", "spiral_matrix", "string_insertion", "n_queens")))
    for task in mix.sample(0, 40):
        mix.score(task, [text, text.replace("<answer>", "<answer>[").replace("</answer>", "]</answer>")])
    assert not mark.exists()


def test_evaluating_scorers_still_read_a_literal():
    mix = gym(Family(name="binary_matrix"))
    task = mix.sample(0, 1)[0]
    rows = [[int(x) for x in line.split()] for line in mix.answer(task).splitlines()]
    assert mix.score(task, [f"<answer>{rows}</answer>"])[0] > 0


def test_long_and_hostile_answers_are_scored_in_no_time(default):
    texts = [f"<answer>{body}</answer>" for body in ("(" * 8000, "9" * 16000, "¬" * 16000, "[" * 16000, "\x00\x1b[2J")]
    for task in default.sample(2, 30):
        assert all(0 <= reward <= 0.5 for reward in default.score(task, texts))


def test_demo_settings_are_a_mix_that_loads():
    checked = settings.from_flat(DEMO_SETTINGS, "demo")
    assert checked.environment.families == DEMO_FAMILIES
    assert len(environments.load(checked.environment).sample(1, 8)) == 8
