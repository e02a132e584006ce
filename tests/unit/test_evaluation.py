"""Held-out evaluation, against rewards that are known and formulas computed another way."""

import itertools
import math
import re
import time
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import environments, evaluation, settings
from worker.commands import evaluate
from worker.errors import TrainingError
from worker.records import Completion, round_seed
from worker.settings import Family, Generation
from worker.telemetry.evaluation_log import Evaluation, FamilyScore

ENVIRONMENT = settings.Environment(
    families=(
        Family(name="gcd", level="auto"),
        Family(name="chain_sum"),
    )
)


class Parrot:
    """Answers rightly as often as it is told to. `asked`: all questions so far."""

    def __init__(self, environment, right_of_four):
        self.environment, self.right_of_four, self.asked = environment, right_of_four, []
        self.answers = {}

    def learn_answers(self, tasks):
        for task in tasks:
            self.answers[self.environment.question(task)] = self.environment.answer(task)

    def generate(self, questions, generation, seed):
        self.asked += questions
        answers = []
        for question in questions:
            right = [f"<answer>{self.answers[question]}</answer>"] * self.right_of_four
            texts = right + ["no"] * (generation.num_generations - self.right_of_four)
            answers.append(
                [Completion(text, (1,), (0.0,), truncated=text == "no") for text in texts]
            )
        return answers


@pytest.fixture(scope="module")
def environment():
    return environments.load(ENVIRONMENT)


def make_parrot(environment, right_of_four, count):
    parrot = Parrot(environment, right_of_four)
    for one in (("gcd", 0), ("gcd", 2), ("chain_sum", None)):
        parrot.learn_answers(environment.tasks_of(*one, evaluation.HELD_OUT, count))
    return parrot


def test_rewards_and_passes_by_family_and_level(environment):
    parrot = make_parrot(environment, 1, 20)
    asked = [("gcd", 0), ("gcd", 2), ("chain_sum", None)]
    scores = evaluation.evaluate(parrot, environment, Generation(num_generations=4), asked, 20)
    assert [(score.family, score.level, score.tasks, score.answers) for score in scores] == [
        ("gcd", 0, 20, 80), ("gcd", 2, 20, 80), ("chain_sum", None, 20, 80),
    ]  # fmt: skip
    for score in scores:
        assert score.reward.value == pytest.approx(0.25)
        assert score.pass_at[1].value == pytest.approx(0.25)
        assert score.pass_at[4].value == 1.0
        assert (score.closed, score.truncated) == (0.25, 0.75)
        assert score.reward.low < 0.25 < score.reward.high
    assert evaluation.mean_reward(scores) == pytest.approx(0.25)


def test_measure_reports_progress_and_records_the_scores(environment):
    parrot = make_parrot(environment, 1, 20)
    asked = [("gcd", 0), ("chain_sum", None)]
    calls = []
    found = evaluation.measure(
        parrot,
        environment,
        Generation(num_generations=4),
        asked,
        20,
        seed=0,
        seconds=60.0,
        round=7,
        rounds_trained=5,
        progress=lambda: calls.append(len(parrot.asked)),
    )
    # Before each of the three pieces of 16 tasks: the watchdog must not take it for a hang.
    assert calls == [0, 16, 32]
    assert (found.round, found.rounds_trained) == (7, 5)
    assert found.reward == pytest.approx(0.25)
    assert [(score.family, score.level, score.tasks, score.k) for score in found.scores] == [
        ("gcd", 0, 20, 4),
        ("chain_sum", None, 20, 4),
    ]


def test_the_time_is_kept_and_all_families_have_their_turn(environment):
    parrot = make_parrot(environment, 4, 40)
    asked = [("gcd", 0), ("gcd", 2), ("chain_sum", None)]
    past = time.monotonic()
    scores = evaluation.evaluate(
        parrot, environment, Generation(num_generations=4), asked, 40, until=past
    )
    assert [score.tasks for score in scores] == [6, 5, 5]


def test_no_round_ever_asks_what_is_held_out():
    assert max(round_seed(f"peer-{i}", i) for i in range(2000)) < evaluation.HELD_OUT


def test_prompts_that_are_too_long_are_counted(environment):
    class TooLong:
        def generate(self, questions, generation, seed):
            return [None] * len(questions)

    [score] = evaluation.evaluate(TooLong(), environment, Generation(), [("gcd", 0)], 3)
    assert (score.tasks, score.too_long, score.pass_at) == (0, 3, {})
    assert (score.reward.low, score.reward.high) == (0.0, 1.0)


@pytest.mark.parametrize(("right", "k"), [(0, 2), (1, 1), (1, 3), (2, 3), (5, 2), (4, 5)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(right, k):
    answers = [1] * right + [0] * (5 - right)
    draws = list(itertools.combinations(answers, k))
    assert evaluation.pass_at_k(5, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_intervals_are_as_wide_as_they_must_be():
    found = evaluation.interval(0.5, 100)
    assert (found.low, found.high) == pytest.approx((0.404, 0.596), abs=0.001)  # Wilson (1927)
    nothing = evaluation.interval(0.0, 10)
    assert nothing.low == 0.0
    assert nothing.high == pytest.approx(0.278, abs=0.001)


class Sure:
    """Gives the right answer of a question a log-probability, and wrong ones another."""

    def __init__(self, parrot, right, wrong):
        self.parrot, self.values = parrot, (wrong, right)

    def logprobs(self, question, choices, seconds):
        assert len(set(choices)) == evaluation.NUM_CHOICES
        answer = self.parrot.answers[question]
        assert choices.count(answer) == 1
        return [self.values[choice == answer] for choice in choices]


@pytest.mark.parametrize(
    ("right", "wrong", "brier"), [(0.0, -99.0, 0.0), (0.0, 0.0, 0.75), (-99.0, 0.0, 4 / 3)]
)
def test_calibration_is_measured_by_family_with_wrong_answers(environment, right, wrong, brier):
    parrot = make_parrot(environment, 1, 6)
    opinion = Sure(parrot, right, wrong)
    asked = [("gcd", 2), ("chain_sum", None)]
    generation = Generation(num_generations=4)
    scores = evaluation.evaluate(parrot, environment, generation, asked, 6, opinion=opinion)
    assert [score.brier for score in scores] == [pytest.approx(brier)] * 2
    plain = evaluation.evaluate(parrot, environment, generation, asked, 6)
    assert [score.brier for score in plain] == [None, None]


def test_table_and_json_have_the_calibration(capsys):
    score = FamilyScore("gcd", 2, 6, 0.5, 0.3, 0.7, 0.5, 0.9, 4, 1.0, 0.0, brier=0.25)
    other = FamilyScore("code/lists", None, 6, 0.5, 0.3, 0.7, 0.5, 0.9, 4, 1.0, 0.0)
    measured = Evaluation(3, 4, 0.0, 1.0, 0.5, (score, other))
    evaluate._print({"before": measured, "now": measured}, ["before", "now"])
    printed = capsys.readouterr().out
    assert re.search(r"^gcd +2 +0\.250 +0\.250$", printed, re.MULTILINE)
    assert printed.count("code/l") == 1  # it has no Brier score
    assert asdict(measured)["scores"][0]["brier"] == 0.25
    assert max(map(len, printed.splitlines())) <= 80


@given(st.integers(1, 500), st.floats(0, 1))
def test_interval_has_the_mean_in_it_and_stays_a_share(count, mean):
    found = evaluation.interval(mean, count)
    assert 0 <= found.low <= mean + 1e-12
    assert mean - 1e-12 <= found.high <= 1
    wider = evaluation.interval(mean, max(1, count // 2))
    assert wider.high - wider.low >= found.high - found.low - 1e-9


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_interval_of_equal_values_is_not_a_point(mean):
    found = evaluation.interval(mean, 20)
    assert found.high - found.low > 0.1


def test_nothing_measured_is_not_a_mean_of_zero():
    found = evaluation.interval(0.0, 0)
    assert math.isnan(found.value)
    assert (found.low, found.high) == (0.0, 1.0)
    assert math.isnan(evaluation.mean_reward([]))


def test_evaluation_that_ends_early_has_asked_all_families_alike(environment):
    parrot = make_parrot(environment, 1, 40)
    asked = [("gcd", 0), ("chain_sum", None)]
    now = [0.0]
    scores = evaluation.evaluate(
        parrot,
        environment,
        Generation(num_generations=4),
        asked,
        40,
        until=-1.0,
        progress=lambda: now.append(1.0),
    )
    assert [score.tasks for score in scores] == [8, 8]
    assert len(now) == 2


def test_tasks_that_are_too_long_are_counted_and_not_scored(environment):
    class Short(Parrot):
        def generate(self, questions, generation, seed):
            found = super().generate(questions, generation, seed)
            return [None if number % 2 else each for number, each in enumerate(found)]

    parrot = Short(environment, 4)
    parrot.answers = make_parrot(environment, 4, 10).answers
    (score,) = evaluation.evaluate(
        parrot, environment, Generation(num_generations=4), [("gcd", 0)], 10
    )
    assert (score.tasks, score.too_long, score.answers, score.reward.value) == (5, 5, 20, 1.0)
    assert len(score.rewards) == 5


def test_only_tasks_that_are_too_long_is_an_error_with_what_to_do(environment):
    class Mute:
        def generate(self, questions, generation, seed):
            return [None] * len(questions)

    with pytest.raises(
        TrainingError, match=r"over generation.max_prompt_length \(77 tokens\); raise"
    ):
        evaluation.measure(
            Mute(),
            environment,
            Generation(max_prompt_length=77),
            [("gcd", 0)],
            2,
            seed=0,
            seconds=60.0,
            round=None,
            rounds_trained=0,
        )


def test_other_seed_asks_other_tasks_and_the_same_seed_the_same(environment):
    def questions(seed):
        return [environment.question(task) for task in environment.tasks_of("gcd", 0, seed, 5)]

    assert questions(evaluation.HELD_OUT) == questions(evaluation.HELD_OUT)
    assert questions(evaluation.HELD_OUT) != questions(evaluation.HELD_OUT + 1)
