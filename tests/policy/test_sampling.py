"""Sampled tokens follow the distribution of transformers."""

import math
import random
from collections import Counter

import pytest
import torch
import transformers
from tiny_engines import PROMPTS, answer, make_engine, make_model

from worker import settings
from worker.policy.engines.sampling import Sampler


def transformers_probabilities(logits, prompt, **limits):
    """Return transformers' distribution: its processors in the order of its `generate`."""
    scores = logits.clone()
    ids = torch.tensor([prompt])
    if "repetition_penalty" in limits:
        scores = transformers.RepetitionPenaltyLogitsProcessor(limits["repetition_penalty"])(
            ids, scores
        )
    if "temperature" in limits:
        scores = transformers.TemperatureLogitsWarper(limits["temperature"])(ids, scores)
    if "top_k" in limits:
        scores = transformers.TopKLogitsWarper(limits["top_k"])(ids, scores)
    if "top_p" in limits:
        scores = transformers.TopPLogitsWarper(limits["top_p"])(ids, scores)
    if "min_p" in limits:
        scores = transformers.MinPLogitsWarper(limits["min_p"])(ids, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_p": 0.05},
        {"min_p": 0.1},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 1.3, "temperature": 1.4, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=lambda limits: "+".join(limits) or "plain",
)
@pytest.mark.parametrize("num_tokens", [30, 10_000])
@pytest.mark.parametrize("way", ["auto", "none"])
def test_distribution_is_that_of_transformers(limits, num_tokens, way, monkeypatch):
    monkeypatch.setenv("HIVEWRIGHT_NATIVE", way)
    torch.manual_seed(1)
    logits, prompt, count = torch.randn(1, num_tokens) * 2, [3, 4, 5, 6, 7, 8], 5000
    expected = transformers_probabilities(logits, prompt, **limits)
    # Each number of an even grid once, so the shares are the probabilities without noise.
    grid = (torch.arange(count) + 0.5) / count
    observed = torch.zeros(num_tokens)
    for part in grid.split(500):
        sampler = Sampler(settings.Generation(**limits), [prompt] * len(part), torch.device("cpu"))
        tokens, logprobs = sampler.choose(logits.expand(len(part), -1), part)
        expected_logprobs = (logits / limits.get("temperature", 1.0)).log_softmax(-1)[0, tokens]
        torch.testing.assert_close(logprobs, expected_logprobs)
        observed += torch.bincount(tokens, minlength=num_tokens) / count
    likely = expected > 10 / count
    torch.testing.assert_close(observed[likely], expected[likely], atol=2e-3, rtol=0)
    torch.testing.assert_close(observed[~likely].sum(), expected[~likely].sum(), atol=5e-3, rtol=0)
    assert not observed[expected == 0].any()


@pytest.mark.parametrize("name", ["lean", "reference"])
@pytest.mark.parametrize(
    "limits", [{"temperature": 0.2}, {"top_p": 0.8, "temperature": 0.3, "repetition_penalty": 1.5}]
)
def test_second_tokens_follow_the_model_s_probabilities(limits, name):
    """Compare pairs of first and second tokens with a plain forward (chi-squared, fixed seeds)."""
    model = make_model()
    engine, prompt, count = make_engine(name, model), PROMPTS[0], 3000
    rows = []
    for seed in range(count // 250):
        rows += answer(
            engine,
            [prompt],
            seed,
            num_generations=250,
            max_completion_length=2,
            end_ids=(),
            **limits,
        )[0]
    observed = Counter(row.token_ids for row in rows)
    first = transformers_probabilities(
        model(torch.tensor([prompt])).logits[:, -1], prompt, **limits
    ).detach()
    expected = {}
    for token in first.topk(10).indices.tolist():
        longer = [*prompt, token]
        second = transformers_probabilities(
            model(torch.tensor([longer])).logits[:, -1], longer, **limits
        )
        expected |= {
            (token, t): count * float(first[token]) * p for t, p in enumerate(second.tolist())
        }
    pooled = [pair for pair, e in expected.items() if e >= 5]
    assert len(pooled) > 20
    chi2 = sum((observed[pair] - expected[pair]) ** 2 / expected[pair] for pair in pooled)
    assert chi2 < len(pooled) + 5 * math.sqrt(2 * len(pooled))  # 5 standard deviations
    assert not any(observed[pair] for pair, e in expected.items() if e == 0)


def test_repetition_penalty_counts_the_tokens_of_each_row_only():
    sampler = Sampler(
        settings.Generation(repetition_penalty=1000.0), [[1], [2]], torch.device("cpu")
    )
    logits = torch.tensor([[1.0, 9.0, 8.0, 0.5], [1.0, 9.0, 8.0, 0.5]])
    half = torch.tensor([0.5, 0.5])
    assert sampler.choose(logits * 10, half)[0].tolist() == [2, 1]
    sampler.keep(torch.tensor([1]))
    assert sampler.choose(logits[:1] * 10, half[:1])[0].tolist() == [0]


@pytest.mark.parametrize("num_tokens", [50, 5000])
@pytest.mark.parametrize("way", ["auto", "none"])
def test_largest_random_number_never_picks_an_impossible_token(num_tokens, way, monkeypatch):
    monkeypatch.setenv("HIVEWRIGHT_NATIVE", way)
    rng = random.Random(0)
    sampler = Sampler(settings.Generation(), [[0]], torch.device("cpu"))
    for _ in range(200):
        logits = torch.tensor([[rng.gauss(0, 3) for _ in range(num_tokens)] + [-math.inf] * 3])
        for uniform in (0.0, 1 - 2**-24):
            assert int(sampler.choose(logits, torch.tensor([uniform]))[0]) < num_tokens
