"""Code tasks: the same everywhere, right for the reference, and not to be had by a constant."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest

from worker import environments, settings
from worker.environments import code
from worker.environments.code import Code
from worker.environments.mixture import Mix
from worker.environments.reasoning_gym import ReasoningGym
from worker.environments.sandbox import Runner
from worker.errors import ResourceError, SettingsError
from worker.settings import Family

FAMILIES = tuple(Family(name=f"code/{name}") for name in code._KINDS)
# Of the first tasks of each family.
DIGESTS = {"lists": "60fe7aa69fbb", "texts": "ba75fa325517", "numbers": "457ba1a01e8d"}


@pytest.fixture(scope="module")
def mix() -> Mix:
    return Mix(settings.Environment(families=FAMILIES), {"code": Code()})


def tagged(program: str) -> str:
    return f"Let me see. <answer>{program}</answer>"


def test_reference_passes_all_tests_fenced_or_not(mix):
    for task in mix.sample(1, 12):
        program = mix.answer(task)
        assert program is not None
        answers = [
            tagged(program),
            tagged(f"\n```python\n{program}\n```\n"),
            program,
            tagged(program + "\n    1 / 0"),
        ]
        assert mix.score(task, answers) == [1.0, 1.0, 0.0, 1.0]


def test_question_shows_the_steps_and_a_right_example(mix):
    for task in mix.sample(2, 60):
        question, space = mix.question(task), {}
        exec(mix.answer(task), space)
        example = question.split("For example, ")[1].split("\n")[0]
        call, _, result = example.removesuffix(".").partition(" returns ")
        assert eval(call, space) == eval(result)
        assert "\n1. " in question
        assert "{" not in question


def test_answers_that_know_nothing_earn_little(mix):
    tasks = mix.sample(3, 20)
    guesses = [
        "def solve(x): return x",
        "def solve(x): return 0",
        "def solve(x): return len(x)",
        "def solve(x): return ''",
    ]
    scores = [mix.score(task, [tagged(guess) for guess in guesses]) for task in tasks]
    assert all(sum(column) / len(tasks) < 0.2 for column in zip(*scores, strict=True))


def test_reward_is_the_share_of_tests_passed(mix):
    task = mix.sample(4, 1)[0]
    program = mix.answer(task)
    assert program is not None
    sometimes = program.replace(
        "def solve(x):", "def solve(x):\n    global n\n    n += 1\n    if n % 2: return None\n"
    )
    assert mix.score(task, [tagged("n = 0\n" + sometimes)]) == [0.5]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "<answer></answer>",
        tagged("def f(x): return 1"),
        tagged("x" * 10_000),
        tagged("while True: pass"),
        tagged("import os; os.kill(os.getppid(), 9)"),
        tagged("def solve(x): return solve(x)"),
        tagged("\x00\ud800"[:1]),
    ],
)
def test_answer_without_a_function_earns_nothing(mix, answer):
    assert mix.score(mix.sample(5, 1)[0], [answer]) == [0.0]


def test_true_is_not_one_and_a_tuple_is_a_list():
    task = code._Task("?", "", ((1, "1"), (2, "[1, 2]")))
    with Runner() as runner:
        for program, share in (
            ("def solve(x): return True if x == 1 else (1, 2)", 0.5),
            ("def solve(x): return 1.0 if x == 1 else [1, 2]", 0.5),
            ("def solve(x): return 1 if x == 1 else [1, 2]", 1.0),
        ):
            assert code._share(task, runner.run(program, "solve", [[1], [2]])) == share


def test_hidden_results_do_not_enter_the_sandbox(mix, monkeypatch):
    jobs: list[str] = []
    ask = Runner._ask

    def note(self: Runner, job: str) -> object:
        jobs.append(job)
        return ask(self, job)

    monkeypatch.setattr(Runner, "_ask", note)
    for task in mix.sample(6, 10):
        mix.score(task, [tagged("def solve(x): return x")])
    assert {tuple(json.loads(job)) for job in jobs} == {
        (
            "program",
            "entry",
            "inputs",
            "cpu_seconds",
            "wall_seconds",
            "memory_bytes",
            "output_bytes",
        )
    }


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_tasks_and_scores_are_the_same_in_another_process(mix, hash_seed):
    guess = tagged("def solve(x): return x")
    script = (
        "import json; from worker import settings, environments\nfamilies ="
        f" {[family.model_dump() for family in FAMILIES]!r}\ne ="
        " environments.load(settings.parse({'environment': {'families': families}},"
        " 'x').environment)\nprint(json.dumps([[t.family, t.config_digest, t.seed, t.index,"
        f" e.question(t), e.answer(t), e.score(t, [{guess!r}])] for t in e.sample(7, 10)]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={"PYTHONHASHSEED": hash_seed},
    ).stdout
    assert json.loads(output) == [
        [*dataclasses.astuple(t), mix.question(t), mix.answer(t), mix.score(t, [guess])]
        for t in mix.sample(7, 10)
    ]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_tasks_of_this_version_are_what_they_always_were(family):
    """A change of the grammar must increase the version.

    Otherwise peers with different tasks would score each other's answers.
    """
    mix = Mix(settings.Environment(families=(family,)), {"code": Code()})
    text = json.dumps([[mix.question(t), mix.answer(t)] for t in mix.sample(8, 40)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    expected = DIGESTS.get(family.name.removeprefix("code/"))
    assert (Code.version, digest) == ("code 1", expected)


def test_levels_ask_for_more_steps():
    def num_steps(level: int) -> float:
        mix = Mix(
            settings.Environment(families=(Family(name="code/lists", level=level),)),
            {"code": Code()},
        )
        return sum(mix.question(task).count("\n") for task in mix.sample(1, 40)) / 40

    assert num_steps(0) < num_steps(2) < num_steps(4)


def test_code_and_reasoning_are_mixed_by_weight():
    families = (Family(name="code/lists", weight=3.0), Family(name="gcd"))
    both = environments.load(settings.Environment(families=families))
    assert both.versions == ("code 1", ReasoningGym.version)
    names = [task.family for task in both.sample(1, 400)]
    assert 270 < names.count("code/lists") < 330
    assert {both.question(task)[:5] for task in both.sample(1, 20)} == {"Write", "Find "}


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            Family(name="code/poems"),
            "code/poems: no such family; expected one of code/lists, ",
        ),
        (
            Family(name="code/lists", config={"steps": 3}),
            "steps: unknown key; expected min_steps and max_steps",
        ),
        (
            Family(name="code/lists", config={"min_steps": 4}),
            "min_steps 4, max_steps 3; expected 1 <= min_steps",
        ),
        (Family(name="code/lists", config={"max_steps": True}), "max_steps True; expected"),
        (Family(name="code/lists", config={"max_steps": 7}), "max_steps 7; expected .*<= 6"),
        (Family(name="code/lists", level=5), "level 5; expected 0 to 4"),
    ],
)
def test_wrong_family_is_a_settings_error(family, message):
    with pytest.raises(SettingsError, match=message):
        Mix(settings.Environment(families=(family,)), {"code": Code()})


def test_environment_is_not_loaded_where_programs_can_not_be_held(monkeypatch):
    def refuse() -> None:
        raise ResourceError("sandbox of code tasks: not available on this machine: no seccomp")

    monkeypatch.setattr(code, "require_isolation", refuse)
    with pytest.raises(ResourceError, match="not available"):
        environments.load(settings.Environment(families=FAMILIES))
