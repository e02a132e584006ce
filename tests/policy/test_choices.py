"""Scoring choices: one batched pass gives what each answer alone has."""

import math
import time

import pytest
import torch

from worker import settings
from worker.environments.answers import tagged
from worker.errors import NotScored
from worker.policy import choices as choices_module
from worker.policy import policy
from worker.policy.choices import ChoiceScorer
from worker.policy.logprobs import Scorer

QUESTION = "What is 2 + 3?"


@pytest.fixture(scope="module")
def tiny():
    return policy.load(settings.Model(device="cpu", threads=1))


def make_scorer(policy, max_prompt=512, max_completion=64, max_tokens=16384) -> ChoiceScorer:
    limits = settings.Generation(max_prompt_length=max_prompt, max_completion_length=max_completion)
    return ChoiceScorer(policy, limits, lambda: max_tokens)


@pytest.fixture
def clock(monkeypatch):
    """A clock on which each pass takes `seconds_each` per token, whatever it takes really."""

    class Clock:
        now, seconds_each, num_tokens = 0.0, 0.0, []

        def monotonic(self):
            return self.now

    found = Clock()
    logprobs = Scorer.logprobs

    def take_time(scorer, groups, temperature):
        num_tokens = scorer.count_tokens(
            [groups[0].prompt], [len(c) for c in groups[0].completions]
        )
        found.now += found.seconds_each * num_tokens
        found.num_tokens = [*found.num_tokens, num_tokens]
        return logprobs(scorer, groups, temperature)

    monkeypatch.setattr(Scorer, "logprobs", take_time)
    monkeypatch.setattr(choices_module, "time", found)
    return found


def test_one_pass_scores_each_choice_as_it_is_alone(tiny):
    choices = ["5", "17", "4"]
    found = make_scorer(tiny).logprobs(QUESTION, choices, 60.0)
    prompt = tiny.prompt_ids(QUESTION)
    for choice, value in zip(choices, found, strict=True):
        ids, _ = tiny.completion_ids(tagged(choice), 64)
        with torch.no_grad():
            logits = tiny.model(torch.tensor([[*prompt, *ids]])).logits[0].float()
        each = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(
            1, torch.tensor(ids)[:, None]
        )
        assert value == pytest.approx(float(each.sum()), abs=1e-2)


def test_pass_that_would_take_too_long_is_not_made(tiny, clock):
    clock.seconds_each = 1.0
    scorer = make_scorer(tiny)
    with pytest.raises(NotScored, match=r"the model would need \d+\.0 s; 60 s are allowed"):
        scorer.logprobs(QUESTION * 20, ["5", "6"], 60.0)
    assert clock.now < 64  # the measurement
    assert scorer.logprobs(QUESTION * 20, ["5", "6"], 1e9)


def test_one_slow_pass_is_not_the_last_one(tiny, clock):
    """The first pass of a process is slow, or the machine was busy: the next question measures."""
    clock.seconds_each = 100.0
    scorer = make_scorer(tiny)
    with pytest.raises(NotScored):
        scorer.logprobs(QUESTION, ["5", "6"], 60.0)
    clock.seconds_each = 0.001
    assert scorer.logprobs(QUESTION, ["5", "6"], 60.0)
    assert len(clock.num_tokens) == 3  # two measurements, and the pass
    assert scorer.logprobs(QUESTION, ["5", "6"], 60.0)
    assert len(clock.num_tokens) == 4


def test_without_a_limit_nothing_is_measured(tiny, clock):
    assert make_scorer(tiny).logprobs(QUESTION, ["5", "6"], math.inf)
    assert len(clock.num_tokens) == 1


def test_long_question_is_not_scored(tiny):
    with pytest.raises(NotScored, match=r"the clue has \d+ tokens; expected 1 to 4"):
        make_scorer(tiny, max_prompt=4).logprobs(QUESTION, ["5", "6"], 60.0)


def test_choice_that_does_not_fit_into_the_context_is_not_scored(tiny):
    """Positions beyond a model's context are an error, on a GPU one that ends the process."""
    num_tokens = tiny.count_tokens(tagged("17"))
    scorer = make_scorer(tiny, max_completion=num_tokens)
    assert scorer.logprobs(QUESTION, ["17", "5"], 60.0)
    with pytest.raises(NotScored, match=rf"a choice has more than {num_tokens} tokens"):
        scorer.logprobs(QUESTION, ["5", "17" * 20], 60.0)


@pytest.mark.parametrize("text", ["\N{PARTY POPPER}" * 7, "\N{GOTHIC LETTER AHSA}" * 7, "\0" * 9])
def test_choice_of_rare_characters_is_scored_whole(tiny, text):
    """Each of them may take several tokens."""
    group = make_scorer(tiny)._tokens(QUESTION, ["5", text])
    assert group.completions[1] == tuple(tiny.completion_ids(tagged(text), 10_000)[0])


def test_more_tokens_than_there_is_memory_for_are_not_scored(tiny):
    many = [f"answer {number}" for number in range(64)]
    with pytest.raises(NotScored, match=r"have \d+ tokens together; this node has memory for 200"):
        make_scorer(tiny, max_tokens=200).logprobs(QUESTION, many, 60.0)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("std::bad_alloc")]
)
def test_lack_of_memory_is_a_reason_and_the_next_question_is_scored(tiny, monkeypatch, error):
    scorer = make_scorer(tiny)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "logprobs", fail)
        with pytest.raises(NotScored, match=f"out of memory while the model .*{error}"):
            scorer.logprobs(QUESTION, ["5", "6"], 60.0)
    assert scorer.logprobs(QUESTION, ["5", "6"], 60.0)


def test_other_faults_of_the_pass_are_raised(tiny, monkeypatch):
    """A GPU that is gone is one, and ends the worker."""

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(Scorer, "logprobs", fail)
    with pytest.raises(RuntimeError, match="launch failure"):
        make_scorer(tiny).logprobs(QUESTION, ["5", "6"], 60.0)


def test_longest_clue_of_a_judge_costs_no_more_than_its_budget(tiny):
    """The longest clue with the most and longest choices, and time for a part of them."""
    scorer = make_scorer(tiny, max_prompt=100_000, max_completion=10_000, max_tokens=1 << 30)
    question, choices = "word " * 4000, ["answer " * 140 + str(i) for i in range(64)]
    assert scorer.logprobs("short", ["yes", "no"], 60.0)
    started = time.monotonic()
    with pytest.raises(NotScored, match="the model would need"):
        scorer.logprobs(question, choices, 0.01)
    tokenizing = time.monotonic() - started
    assert tokenizing < 5  # a tenth of a second on a machine that does nothing else
