"""Scoring choices: one batched pass gives what each answer alone has."""

import time

import pytest
import torch

from worker import settings
from worker.environments.answers import tagged
from worker.policy import policy
from worker.policy.choices import ChoiceScorer


@pytest.fixture(scope="module")
def tiny():
    return policy.load(settings.Model(device="cpu", threads=1))


def test_one_pass_scores_each_choice_as_it_is_alone(tiny):
    question, choices = "What is 2 + 3?", ["5", "17", "4"]
    found = ChoiceScorer(tiny, 512).logprobs(question, choices, 60.0)
    prompt = tiny.prompt_ids(question)
    for choice, value in zip(choices, found, strict=True):
        ids, _ = tiny.completion_ids(tagged(choice), 64)
        with torch.no_grad():
            logits = tiny.model(torch.tensor([[*prompt, *ids]])).logits[0].float()
        each = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(
            1, torch.tensor(ids)[:, None]
        )
        assert value == pytest.approx(float(each.sum()), abs=1e-2)


def test_pass_that_would_take_too_long_is_not_made(tiny):
    scorer = ChoiceScorer(tiny, 512)
    assert scorer.logprobs("What is 2 + 3?", ["5", "6"], 1e-9) is None
    assert scorer.logprobs("What is 2 + 3?", ["5", "6"], 60.0) is not None


def test_long_question_is_not_scored(tiny):
    assert ChoiceScorer(tiny, 4).logprobs("What is 2 + 3?" * 9, ["5", "6"], 60.0) is None


def test_longest_clue_of_a_judge_costs_no_more_than_its_budget(tiny):
    """The longest clue with the most and longest choices, and time for a part of them."""
    scorer = ChoiceScorer(tiny, 100_000)
    question, choices = "word " * 4000, ["answer " * 140 + str(i) for i in range(64)]
    assert scorer.logprobs("short", ["yes", "no"], 60.0) is not None
    started = time.monotonic()
    assert scorer.logprobs(question, choices, 0.01) is None
    tokenizing = time.monotonic() - started
    assert tokenizing < 5  # a tenth of a second on a machine that does nothing else
