import math
import random
from collections import Counter

import pytest
import torch
import transformers

from worker import settings
from worker.policy.generation import Sampler, generate
from worker.policy.scoring import completion_logprobs

torch.set_num_threads(1)  # cores are shared; such models gain nothing from more

VOCABULARY = 120
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
WINDOW = {"sliding_window": 8}
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "llama": (transformers.LlamaConfig, {}),
    "gemma": (transformers.GemmaConfig, {}),
    "gemma2": (transformers.Gemma2Config, {**WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3": (transformers.Gemma3TextConfig, {**WINDOW, "query_pre_attn_scalar": 8}),
    "mistral": (transformers.MistralConfig, WINDOW),
}
PROMPTS = [[5, 6, 7], [9] * 11, list(range(3, 21))]
NOTHING_ENDS = torch.zeros(VOCABULARY, dtype=torch.bool)


def make_model(family: str = "qwen2"):
    torch.manual_seed(0)
    config, departures = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(config(**SHAPE, **departures)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)  # random weights say the same of everything: make them say different things
    return model


def sample(model, prompts=PROMPTS, seed=0, end_ids=(1,), is_done=None, may_be_done=NOTHING_ENDS, **options):
    generation = settings.Generation(**{"num_generations": 2, "max_completion_length": 20, **options})
    return generate(model, prompts, generation, seed, end_ids, is_done or (lambda tokens: False), may_be_done)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_those_of_transformers(family):
    model = make_model(family)
    for prompt, rows in zip(PROMPTS, sample(model, top_k=1), strict=True):
        ids = torch.tensor([prompt])
        reference = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        reference = reference[0, len(prompt) :].tolist()
        assert [list(row.token_ids) for row in rows] == [reference] * 2
        logits = model(torch.tensor([prompt + reference])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(reference)[:, None])[:, 0].tolist()
        assert rows[0].logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_of_given_completions_equal_one_plain_pass(family):
    model = make_model(family)
    completions = [[4, 5, 6, 1], [7], [8] * 13]
    ours = completion_logprobs(model, PROMPTS, completions, [2, 0, 1], temperature=0.7)
    assert ours.shape == (3, 13)
    for row, (completion, prompt) in enumerate(zip(completions, (PROMPTS[2], PROMPTS[0], PROMPTS[1]), strict=True)):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(ours[row, : len(completion)], expected, atol=1e-4, rtol=1e-4)
        assert not ours[row, len(completion) :].any()


def test_same_seed_gives_same_answers_and_another_seed_others():
    model = make_model()
    assert sample(model, seed=3) == sample(model, seed=3)
    assert sample(model, seed=3) != sample(model, seed=4)


def test_answers_do_not_depend_on_when_other_rows_finish():
    model = make_model()
    free = sample(model, num_generations=4, end_ids=())
    # Let rows end early, at different steps: what the others say must stay.
    stopped = sample(
        model, num_generations=4, end_ids=(), is_done=lambda t: t[-1] < 30, may_be_done=torch.arange(VOCABULARY) < 30
    )
    lengths = set()
    for whole, cut in zip((r for g in free for r in g), (r for g in stopped for r in g), strict=True):
        assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
        assert cut.finished == (cut.token_ids[-1] < 30)
        lengths.add(len(cut.token_ids))
    assert len(lengths) > 3


def test_row_ends_with_its_end_token_or_unfinished_at_the_limit():
    model = make_model()
    rows = [
        row
        for group in sample(model, num_generations=16, end_ids=tuple(range(40)), max_completion_length=6)
        for row in group
    ]
    for row in rows:
        assert len(row.token_ids) == len(row.logprobs) <= 6
        assert row.finished == (row.token_ids[-1] < 40)
        assert all(token >= 40 for token in row.token_ids[:-1])
        assert row.finished or len(row.token_ids) == 6
    assert {row.finished for row in rows} == {True, False}


def test_no_prompt_gives_no_answer():
    assert sample(make_model(), prompts=[]) == []


def transformers_probabilities(logits, prompt, **limits):
    """What transformers would sample from: its processors in the order in which its `generate` applies them."""
    scores = logits.clone()
    ids = torch.tensor([prompt])
    if "repetition_penalty" in limits:
        scores = transformers.RepetitionPenaltyLogitsProcessor(limits["repetition_penalty"])(ids, scores)
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
        {"min_p": 0.1},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 1.3, "temperature": 1.4, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=lambda limits: "+".join(limits) or "plain",
)
def test_distribution_is_that_of_transformers(limits):
    torch.manual_seed(1)
    logits, prompt, count = torch.randn(1, 30) * 2, [3, 4, 5, 6, 7, 8], 5000
    expected = transformers_probabilities(logits, prompt, **limits)
    # Every number of an even grid once: the shares are the probabilities, with no chance in it.
    grid = (torch.arange(count) + 0.5) / count
    sampler = Sampler(settings.Generation(**limits), [prompt] * count, 30, torch.device("cpu"))
    tokens, logprobs = sampler.choose(logits.expand(count, -1), grid, list(range(count)))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[0, tokens])
    shares = torch.bincount(tokens, minlength=30) / count
    torch.testing.assert_close(shares, expected, atol=2e-3, rtol=0)


def test_sampled_tokens_follow_the_model_s_probabilities():
    model = make_model()
    logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    count = 4000
    rows = sample(model, [PROMPTS[0]], num_generations=250, max_completion_length=1, end_ids=())[0]
    for seed in range(1, count // 250):
        rows += sample(model, [PROMPTS[0]], seed=seed, num_generations=250, max_completion_length=1, end_ids=())[0]
    observed = Counter(row.token_ids[0] for row in rows)
    expected = {t: p * count for t, p in enumerate(logits.softmax(-1).tolist())}
    pooled = [t for t, e in expected.items() if e >= 5]
    chi2 = sum((observed[t] - expected[t]) ** 2 / expected[t] for t in pooled)
    # 5 standard deviations of a chi-squared variable
    assert chi2 < len(pooled) + 5 * math.sqrt(2 * len(pooled))


def test_repetition_penalty_counts_the_tokens_of_each_row_only():
    sampler = Sampler(settings.Generation(repetition_penalty=1000.0), [[1], [2]], 4, torch.device("cpu"))
    logits = torch.tensor([[1.0, 9.0, 8.0, 0.5], [1.0, 9.0, 8.0, 0.5]])
    half = torch.tensor([0.5, 0.5])
    assert sampler.choose(logits * 10, half, [0, 1])[0].tolist() == [2, 1]
    assert sampler.choose(logits[:1] * 10, half, [1])[0].tolist() == [0]


def test_largest_random_number_never_picks_an_impossible_token():
    rng = random.Random(0)
    for _ in range(200):
        logits = torch.tensor([[rng.gauss(0, 3) for _ in range(50)] + [-math.inf] * 3])
        sampler = Sampler(settings.Generation(), [[0]], 53, torch.device("cpu"))
        assert int(sampler.choose(logits, torch.tensor([1 - 2**-20]), [0])[0]) < 50
