"""All families of reasoning-gym: the survey's verdicts, and guards over generous scorers."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import fmean

import pytest
from reasoning_gym.factory import DATASETS

from worker import settings
from worker.environments import Recipe, propositional, reasoning_gym
from worker.environments.guards import GUARDS
from worker.environments.mixture import Mix
from worker.environments.reasoning_gym import ReasoningGym, verdicts
from worker.errors import BadRecord, SettingsError
from worker.settings import Family

FILE = json.loads(reasoning_gym.FAMILIES_FILE.read_text())["families"]
ASKED = sorted(name for name, row in FILE.items() if row["verdict"] != "refused")
QUICK = [name for name in ASKED if FILE[name]["seconds"] < 0.02]
"""The nightly survey has the others too."""

MAKE_ALL = """
import hashlib, json, random, sys
from worker.environments import Recipe, reasoning_gym
random.seed(sys.argv[1])
digests = {}
for family in sys.argv[2:]:
    texts = []
    for seed in (5, 6):
        dataset, item = reasoning_gym._make_item(Recipe(family, "{}", seed))
        answers = ("0", "1", "No", item["question"].split()[-1], str(item["answer"]))
        rewards = [
            reasoning_gym._score(dataset, item, family, f"<answer>{answer}</answer>")
            for answer in answers
        ]
        texts.append([item["question"], str(item["answer"]), rewards])
    digests[family] = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
print("digests", json.dumps(digests))
"""


def make_all(hash_seed: str) -> dict[str, str]:
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MAKE_ALL, hash_seed, *QUICK],
        env={"PYTHONHASHSEED": hash_seed, "TZ": "Asia/Tokyo" if hash_seed == "2" else "UTC"},
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    ).stdout
    digests: dict[str, str] = json.loads(output.rpartition("digests ")[2])
    return digests


def test_every_family_has_a_verdict():
    assert FILE.keys() == DATASETS.keys()
    assert {row["verdict"] for row in FILE.values()} == {"safe", "guarded", "refused"}
    assert {name for name, row in FILE.items() if row["verdict"] == "guarded"} == GUARDS.keys()
    assert all(row["reason"] for row in FILE.values() if row["verdict"] != "safe")


def test_every_family_that_is_quick_is_the_same_in_two_processes():
    assert make_all("1") == make_all("2")


@pytest.mark.parametrize("name", sorted(set(DATASETS) - set(ASKED)))
def test_refused_family_is_named_with_the_reason(name):
    with pytest.raises(SettingsError, match=r"refused: .*take another family") as caught:
        ReasoningGym().check(name, {})
    assert FILE[name]["reason"] in str(caught.value)


def test_survey_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    verdicts.cache_clear()
    with pytest.raises(
        SettingsError, match=r"written for reasoning-gym 0\.1\.25, installed is 99.0"
    ):
        verdicts()
    verdicts.cache_clear()


def items(family: str, count: int, config: str = "{}"):
    return [reasoning_gym._make_item(Recipe(family, config, seed)) for seed in range(count)]


def earned(family: str, answer_of, count: int = 40, config: str = "{}") -> float:
    return fmean(
        reasoning_gym._score(dataset, item, family, f"<answer>{answer_of(item)}</answer>")
        for dataset, item in items(family, count, config)
    )


def last_word(item) -> str:
    return item["question"].split()[-1]


@pytest.mark.parametrize(
    ("family", "answer_of", "at_most"),
    [
        ("coin_flip", lambda item: "0", 0.1),
        ("game_of_life_halting", lambda item: "maybe", 0.0),
        ("number_sequence", lambda item: item["question"].split(",")[-2].strip(), 0.1),
        ("polynomial_equations", lambda item: "", 0.0),
        ("prime_factorization", lambda item: item["metadata"]["number"], 0.3),
        ("rectangle_count", lambda item: "2", 0.35),
        ("string_insertion", last_word, 0.05),
        ("string_manipulation", last_word, 0.05),
        ("complex_arithmetic", lambda item: "nan", 0.0),
        ("complex_arithmetic", lambda item: "nan+1j", 0.0),
        ("complex_arithmetic", lambda item: "nani", 0.0),
        ("complex_arithmetic", lambda item: "(n an)", 0.0),
        ("calendar_arithmetic", lambda item: "999999", 0.0),
    ],
)
def test_cheap_answer_earns_no_more_than_chance(family, answer_of, at_most):
    assert earned(family, answer_of) <= at_most


@pytest.mark.parametrize("family", sorted(GUARDS.keys() - {"propositional_logic"}))
def test_right_answer_of_a_guarded_family_earns_all(family):
    assert earned(family, lambda item: item["answer"], 20) == 1.0


def test_huge_exponents_are_not_computed():
    """Fraction("1e999999999") would take minutes and gigabytes."""
    huge = (
        "1e999999999",
        "-1e-999999999",
        "1E+99_999_999",
        "1e9,9,9,9,9,9,9,9,9",
        "1e\u0663000000",
        "1 e9 999 999",
    )
    for answer in huge:
        assert earned("coin_flip", lambda item, answer=answer: answer, 1) == 0.0


# -- propositional logic
# -----------------------------------------------------------------------------------------


def item_of(variables: str, *premises: str) -> dict:
    return {"metadata": {"variables": list(variables), "premises": list(premises)}}


@pytest.mark.parametrize(
    ("premises", "answer", "reward"),
    [
        (("P", "(P → Q)"), "Q", 1.0),
        (("P", "(P → Q)"), "P", 0.05),  # a copy
        (("P", "(P → Q)"), "(P → Q)", 0.05),
        (("P", "(P → Q)"), "¬P → Q", 0.05),  # follows from P alone
        (("P", "(P → Q)"), "P ∧ (P → Q)", 0.05),  # both premises
        (("P", "(P → Q)"), "(P ∧ (P → Q)) ∨ R", 0.05),  # in disguise
        (("P", "(P → Q)"), "Q ∨ ¬Q", 0.05),  # a tautology
        (("P", "(P → Q)"), "Q ∧ ¬Q", 0.05),  # a contradiction
        (("P", "(P → Q)"), "¬Q", 0.05),
        (("P", "(P → Q)"), "S", 0.0),
        (("P", "(P → Q)"), "Q ∧", 0.0),
        (("P", "(P → Q)"), "therefore Q", 0.0),
        (("P", "(P → Q)"), "", 0.0),
        (("P", "(P → Q)"), "¬" * 300 + "Q", 0.0),
        (("(P → Q)", "(Q → R)"), "P → R", 1.0),
        (("(P → Q)", "(Q → R)"), "¬R → ¬P", 1.0),
        (("(P ∨ Q)", "(¬P ∨ Q)"), "Q", 1.0),
        (("(P ∨ Q)", "(¬P ∨ Q)"), "(Q ∨ P) ∧ (Q ∨ ¬P)", 0.05),  # the premises, joined
        (("P", "(P → Q)", "(Q → R)"), "Q ∧ R", 1.0),
        (("(P ↔ Q)", "¬Q"), "¬P", 1.0),
    ],
)
def test_conclusion_earns_only_if_no_premise_says_it_alone(premises, answer, reward):
    assert propositional.score(item_of("PQR", *premises), answer) == reward


@pytest.mark.parametrize(
    ("premises", "sound"),
    [
        (("Q", "(Q → P)"), True),
        (("P", "(P → Q)"), False),  # one of the two in three that are left out
        (("(P → Q)", "¬Q"), True),
        (("P", "¬P"), False),  # anything would follow
        (("P", "Q"), False),  # nothing follows but what they say
        (("(P ∨ ¬P)", "Q"), False),
    ],
)
def test_item_is_asked_only_if_it_has_a_conclusion(premises, sound):
    assert propositional.is_sound(item_of("PQ", *premises)) is sound


def test_no_premise_and_no_contradiction_earns_in_the_default_mix():
    for dataset, item in items("propositional_logic", 60):
        variables, premises = item["metadata"]["variables"], item["metadata"]["premises"]
        x, y = variables[:2]
        for answer in (*premises, f"(({x} ∧ ¬{x}) ∧ {y})", " ∧ ".join(premises), "X", "."):
            reward = reasoning_gym._score(
                dataset, item, "propositional_logic", f"<answer>{answer}</answer>"
            )
            assert reward <= 0.05


def test_one_variable_whatever_the_premises_say_earns_no_more_than_chance_at_the_easiest_level():
    """One of at least four literals is right by chance."""
    config = json.dumps(ReasoningGym().levels("propositional_logic", {})[0])
    for guess in ("P", "Q", "¬P", "¬Q"):
        assert earned("propositional_logic", lambda item, guess=guess: guess, 120, config) < 0.3, (
            guess
        )


def test_level_without_a_sound_item_is_left_out():
    """Level 0 of reasoning-gym's curriculum has bare variables as premises, which imply nothing."""
    levels = ReasoningGym().levels("propositional_logic", {})
    assert len(levels) == 4
    assert levels[0]["max_complexity"] == 2
    with pytest.raises(
        SettingsError, match="no task of it is sound: anything follows from contradicting"
    ):
        ReasoningGym().check("propositional_logic", {"min_complexity": 1, "max_complexity": 1})


def test_recipe_without_a_sound_item_is_an_unknown_task(monkeypatch):
    monkeypatch.setattr(reasoning_gym, "MAX_DRAWS", 3)
    with pytest.raises(BadRecord, match="none of 3 items is sound") as caught:
        items("propositional_logic", 1, '{"min_complexity": 1, "max_complexity": 1}')
    assert caught.value.reason == "unknown-task"


def test_guard_changes_the_digest_of_its_family_alone():
    mix = Mix(
        settings.Environment(families=(Family(name="gcd"), Family(name="coin_flip"))),
        {"reasoning-gym": ReasoningGym()},
    )
    assert ReasoningGym().version_of("gcd") == ReasoningGym.version
    assert ReasoningGym().version_of("coin_flip") == f"{ReasoningGym.version} guard 1"
    assert {task.family for task in mix.sample(0, 20)} == {"gcd", "coin_flip"}


def test_odd_programs_write_no_warnings():
    """An answer with a thousand of Python's warnings must not fill the log."""
    dataset, item = items("binary_matrix", 1)[0]
    with warnings.catch_warnings(record=True) as caught:
        reasoning_gym._score(dataset, item, "binary_matrix", f"<answer>{'1or ' * 50}1</answer>")
    assert not [each for each in caught if each.category is SyntaxWarning]


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_whole_survey_comes_to_the_same_verdicts():
    """Some ten minutes: scripts/survey_families.py over everything."""
    from scripts import survey_families  # type: ignore[import-not-found]

    for family, row in FILE.items():
        if family not in survey_families.NOT_SURVEYED:
            found = [survey_families.run(family, hash_seed) for hash_seed in (3, 4)]
            assert survey_families.judge(family, found)["verdict"] == row["verdict"], family


def test_docs_have_every_family_that_is_guarded_or_refused():
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    for name, row in FILE.items():
        if row["verdict"] != "safe":
            assert f"| `{name}` | {row['verdict']} | {row['reason']} |" in text
