"""Tests of the vLLM engine, with a stand-in (vllm_stand_in.py) and with vLLM if it is installed."""

import copy
import math
import random
import sys
from collections import Counter

import pytest
import torch
import transformers
import vllm_stand_in

from tests.groups import scored_group
from worker import settings
from worker.errors import ModelError
from worker.policy import lora
from worker.policy.engines import torch_engine as engines
from worker.policy.engines import vllm as module
from worker.policy.engines.engine import Ending
from worker.policy.engines.torch_engine import TorchEngine, load_engine
from worker.policy.engines.transformers_engine import ReferenceEngine
from worker.policy.engines.vllm import VllmEngine
from worker.policy.logprobs import completion_logprobs
from worker.policy.policy import Policy, load
from worker.records import Task
from worker.trainer.trainer import Trainer

HAS_REAL = module.is_installed()
PROMPTS = [[5, 6, 7], [9] * 40, list(range(3, 23))]
LENGTHS = {"max_prompt_length": 64, "max_completion_length": 12, "num_generations": 3}
# On a CPU vLLM would otherwise compile its kernels and use half of the memory.
FRUGAL = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}


@pytest.fixture(scope="module")
def pristine():
    torch.set_num_threads(1)
    return load(settings.Model(device="cpu"))


@pytest.fixture(params=["stand-in", "real"] if HAS_REAL else ["stand-in"])
def backend(request, monkeypatch):
    if request.param == "real":
        real = module._arguments
        monkeypatch.setattr(module, "_arguments", lambda *given: {**real(*given), **FRUGAL})
    else:
        stand_in(monkeypatch)
    return request.param


def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", vllm_stand_in)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", vllm_stand_in.sampling_params)
    monkeypatch.setattr(vllm_stand_in.LLM, "started", [])


def make_engine(model, **options):
    return VllmEngine(model, settings.Generation(**LENGTHS, **options))


def answer(engine, prompts=PROMPTS, seed=0, end_ids=(), is_done=None, may_be_done=None, **options):
    generation = settings.Generation(**{**LENGTHS, **options})
    never = [False] * 4096
    ending = Ending(frozenset(end_ids), is_done or (lambda tokens: False), may_be_done or never)
    return engine.generate(prompts, generation, seed, ending)


def tokens(groups):
    return [[row.token_ids for row in group] for group in groups]


def expect_own_logprobs(model, groups, prompts=PROMPTS, temperature=1.0):
    rows = [row for group in groups for row in group]
    prompt_of = [i for i, group in enumerate(groups) for _ in group]
    with torch.no_grad():
        token_ids = [row.token_ids for row in rows]
        expected = completion_logprobs(model, prompts, token_ids, prompt_of, temperature)
    for row, logprobs in zip(rows, expected.tolist(), strict=True):
        assert row.logprobs == pytest.approx(logprobs[: len(row.token_ids)], abs=1e-3)


def test_greedy_answers_are_those_of_transformers(pristine, backend):
    groups = answer(make_engine(pristine.model), top_k=1)
    assert tokens(groups) == tokens(answer(ReferenceEngine(pristine.model), top_k=1))
    expect_own_logprobs(pristine.model, groups)


def test_sampled_answers_follow_the_seed_and_carry_our_log_probabilities(pristine, backend):
    engine = make_engine(pristine.model)
    groups = answer(engine, seed=3, top_p=0.9, repetition_penalty=1.2)
    expect_own_logprobs(pristine.model, groups)  # before the limits
    cool = VllmEngine(pristine.model, settings.Generation(**LENGTHS, temperature=0.7))
    expect_own_logprobs(pristine.model, answer(cool, seed=3, temperature=0.7), temperature=0.7)
    groups = answer(engine, seed=3, temperature=0.7, top_p=0.9, repetition_penalty=1.2)
    assert groups == answer(engine, seed=3, temperature=0.7, top_p=0.9, repetition_penalty=1.2)
    assert groups != answer(engine, seed=4, temperature=0.7, top_p=0.9, repetition_penalty=1.2)
    assert len({row.token_ids for row in answer(engine, temperature=2.0)[0]}) == 3


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"top_k": 4, "temperature": 1.5},
        {"top_p": 0.6, "repetition_penalty": 1.5},
        {"min_p": 0.1},
    ],
    ids=lambda limits: "+".join(limits) or "plain",
)
def test_tokens_are_drawn_as_transformers_would(pristine, backend, limits):
    """Compare first tokens with transformers (chi-squared, fixed seeds)."""
    engine, count = make_engine(pristine.model), 2000
    prompt = pristine.prompt_ids("Calculate 2 + 3.")
    observed = Counter()
    for seed in range(count // 250):
        rows = answer(
            engine, [prompt], seed, num_generations=250, max_completion_length=1, **limits
        )[0]
        observed.update(row.token_ids[0] for row in rows)
    with torch.no_grad():
        scores = pristine.model(torch.tensor([prompt])).logits[:, -1]
    ids = torch.tensor([prompt])
    if "repetition_penalty" in limits:
        scores = transformers.RepetitionPenaltyLogitsProcessor(limits["repetition_penalty"])(
            ids, scores
        )
    scores = scores / limits.get("temperature", 1.0)
    if "top_k" in limits:
        scores = transformers.TopKLogitsWarper(limits["top_k"])(ids, scores)
    if "top_p" in limits:
        scores = transformers.TopPLogitsWarper(limits["top_p"])(ids, scores)
    if "min_p" in limits:
        scores = transformers.MinPLogitsWarper(limits["min_p"])(ids, scores)
    expected = count * scores.softmax(-1)[0]
    pooled = [t for t, e in enumerate(expected.tolist()) if e >= 5]
    chi2 = sum((observed[t] - float(expected[t])) ** 2 / float(expected[t]) for t in pooled)
    assert chi2 < len(pooled) + 5 * math.sqrt(2 * len(pooled))
    assert not any(expected[t] == 0 for t in observed)


def test_answer_ends_where_all_engines_end_it(pristine, backend):
    engine = make_engine(pristine.model)
    free = [row for group in answer(engine, seed=1, temperature=1.5) for row in group]
    # An end token, which is kept; our rule, applied after some tokens only; or the limit.
    ends = {free[0].token_ids[4], free[1].token_ids[2]}
    marked = {row.token_ids[6] for row in free[3:5]}
    flags = [token in marked for token in range(4096)]
    groups = answer(
        engine,
        seed=1,
        temperature=1.5,
        end_ids=ends,
        is_done=lambda t: len(t) % 2 == 1,
        may_be_done=flags,
    )
    assert {row.finished for group in groups for row in group} == {True, False}
    for whole, row in zip(free, (row for group in groups for row in group), strict=True):
        stops = [
            i for i, t in enumerate(whole.token_ids) if t in ends or (t in marked and i % 2 == 0)
        ]
        assert row.finished == bool(stops)
        assert row.token_ids == whole.token_ids[: stops[0] + 1 if stops else None]
        assert len(row.logprobs) == len(row.token_ids)


def test_new_weights_are_brought_over_and_old_keys_forgotten(pristine, backend):
    model = copy.deepcopy(pristine.model)
    engine = make_engine(model)
    before = answer(engine, top_k=1)
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    after = answer(engine, top_k=1)
    assert tokens(after) != tokens(before)
    assert tokens(after) == tokens(answer(ReferenceEngine(model), top_k=1))
    expect_own_logprobs(model, after)
    model.load_state_dict(pristine.model.state_dict())  # as a checkpoint is restored
    assert tokens(answer(engine, top_k=1)) == tokens(before)


def test_adapters_are_merged_into_what_is_brought_over(pristine, backend):
    policy = Policy(copy.deepcopy(pristine.model), pristine.tokenizer, pristine.name)
    generation = settings.Generation(**LENGTHS, engine="vllm")
    trainer = Trainer(
        policy, settings.Trainer(lora=settings.Lora(rank=4), learning_rate=3e-2), generation
    )
    engine = policy._load_engine(generation)
    assert isinstance(engine, VllmEngine)
    before = answer(engine, top_k=1)
    assert tokens(before) == tokens(answer(ReferenceEngine(pristine.model), top_k=1))
    groups = [
        scored_group(
            Task("basic_arithmetic", "0" * 12, 0, 0),
            "1 + 1",
            ("",) * 3,
            (1.0, 0.0, 0.5),
            token_ids=((5, 6, 7), (8, 9), (10, 11, 12)),
            truncated=(False,) * 3,
        )
    ]
    for _ in range(3):
        trainer.step(groups)
    after = answer(engine, top_k=1)
    assert after != before
    expect_own_logprobs(policy.model, after)


def test_young_adapter_beside_bfloat16_weights_is_brought_over_whole(pristine, backend):
    """Check the mean of the handed over values; rounding to nearest would lose nine tenths."""
    model = copy.deepcopy(pristine.model).bfloat16()
    lora.attach(model, settings.Lora(rank=4))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=1e-5)
    engine = make_engine(model)
    brought = dict(engine._weights())
    layers = {
        name: layer for name, layer in model.named_modules() if lora.plain(layer) is not layer
    }
    kept = wanted = nearest = 0.0
    for name, layer in layers.items():
        base, merged = lora.base_weight_of(layer).float(), lora.weight_of(layer)
        added = merged - base
        weight = brought[f"{name}.weight"]
        assert weight.dtype is torch.bfloat16
        kept += float(((weight.float() - base) * added).sum())
        nearest += float(((merged.bfloat16().float() - base) * added).sum())
        wanted += float((added * added).sum())
    assert nearest / wanted < 0.5
    assert 0.8 < kept / wanted < 1.2
    # Where nothing was trained since, nothing changes; weights without an adapter are handed over
    # as they are.
    assert all(torch.equal(weight, brought[name]) for name, weight in engine._weights())
    assert torch.equal(brought["model.embed_tokens.weight"], model.get_input_embeddings().weight)


def test_random_numbers_of_the_process_stay_as_they_are(pristine, backend):
    random.seed(7)
    torch.manual_seed(7)
    states = random.getstate(), torch.get_rng_state()
    answer(make_engine(pristine.model))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_policy_answers_questions_through_it(pristine, backend):
    policy = Policy(pristine.model, pristine.tokenizer, pristine.name)
    generation = settings.Generation(
        num_generations=16, max_prompt_length=64, max_completion_length=12, engine="vllm"
    )
    completions = policy.generate(["Calculate 2 + 3.", "Calculate 4 - 1."], generation, seed=1)
    texts = [completion.text for group in completions for completion in group]
    assert any(text.endswith("</answer>") for text in texts)
    assert all(text.partition("</answer>")[2] == "" for text in texts)


def test_model_that_says_other_things_in_vllm_is_refused(pristine, backend):
    model = copy.deepcopy(pristine.model)
    # A change that vLLM can't see.
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: output * 1.5)
    with pytest.raises(
        ModelError,
        match=r"its log-probabilities of qwen2 are \S+ from those of transformers on average",
    ):
        make_engine(model)


def test_stand_in_reads_each_prompt_once_and_weights_only_when_they_change(pristine, monkeypatch):
    stand_in(monkeypatch)
    engine = make_engine(pristine.model)
    (llm,) = vllm_stand_in.LLM.started
    assert (llm.num_reloads, llm.num_resets) == (1, 1)
    llm.llm_engine.cache.clear()
    llm.llm_engine.num_prompts_read = 0
    answer(engine, num_generations=8)
    answer(engine, num_generations=8)
    assert llm.llm_engine.num_prompts_read == len(PROMPTS)
    assert (llm.num_reloads, llm.num_resets) == (1, 1)


def test_old_keys_that_vllm_does_not_give_up_are_an_error(pristine, monkeypatch):
    stand_in(monkeypatch)
    monkeypatch.setattr(vllm_stand_in.LLM, "reset_prefix_cache", lambda self: False)
    with pytest.raises(ModelError, match="can't reset its prefix cache"):
        make_engine(pristine.model)


def test_model_that_vllm_does_not_know_is_a_model_error(monkeypatch):
    stand_in(monkeypatch)
    config = transformers.GPTNeoXConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(
        ModelError, match=r"vllm 0.32.0 .* can't run this gpt_neox here: .*; change .* or set"
    ):
        VllmEngine(model, settings.Generation(**LENGTHS))
    assert model.config.architectures is None


def test_weights_that_vllm_has_no_place_for_are_a_model_error(pristine, monkeypatch):
    stand_in(monkeypatch)

    def reload_weights(self, *arguments, **more):
        raise KeyError("layers.0.self_attn.sinks")

    monkeypatch.setattr(vllm_stand_in.LLM, "collective_rpc", reload_weights)
    with pytest.raises(
        ModelError, match=r"can't run this qwen2 here: 'layers.0.self_attn.sinks'; change"
    ):
        make_engine(pristine.model)


def test_arguments_leave_nothing_to_the_machine_or_the_model(pristine, monkeypatch):
    stand_in(monkeypatch)
    VllmEngine(pristine.model, settings.Generation(**LENGTHS, vllm_memory=0.45))
    (llm,) = vllm_stand_in.LLM.started
    arguments = {name: value for name, value in llm.arguments.items() if name != "model"}
    assert arguments == {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": "float32",
        "max_model_len": 76,
        "gpu_memory_utilization": 0.45,
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs",
        "distributed_executor_backend": "uni",
        "async_scheduling": False,
        "seed": 0,
    }
    second = module._arguments(torch.device("cuda", 1), torch.bfloat16, settings.Generation())
    assert (second["device_ids"], second["dtype"]) == ([1], "bfloat16")


@pytest.mark.skipif(HAS_REAL, reason="vLLM is here")
def test_engine_that_is_asked_for_and_not_installed_is_a_model_error(pristine):
    with pytest.raises(
        ModelError,
        match=r"generation.engine: vllm: can't be imported: No module named 'vllm'; expected",
    ):
        load_engine(pristine.model, settings.Generation(engine="vllm"))


class OnGpu:
    """The attributes that the choice of an engine reads."""

    device = torch.device("cuda", 0)


def test_auto_takes_vllm_on_a_gpu_where_it_is_installed_and_says_why_not(monkeypatch, caplog):
    monkeypatch.setattr(engines, "TorchEngine", lambda *arguments: "torch")
    monkeypatch.setattr(engines, "VllmEngine", lambda *arguments: "vllm")
    monkeypatch.setattr(engines.memory, "release", lambda device: None)
    auto = settings.Generation()
    monkeypatch.setattr(module, "is_installed", lambda: False)
    assert load_engine(OnGpu(), auto) == "torch"
    monkeypatch.setattr(module, "is_installed", lambda: True)
    assert load_engine(OnGpu(), auto) == "vllm"
    assert load_engine(OnGpu(), settings.Generation(engine="torch")) == "torch"

    def fail(*arguments):
        raise ModelError("no such kernel")

    monkeypatch.setattr(engines, "VllmEngine", fail)
    assert load_engine(OnGpu(), auto) == "torch"
    assert "vllm not used reason=no such kernel" in caplog.text
    monkeypatch.setattr(engines, "TorchEngine", lambda *arguments: arguments[-1])
    (setback,) = load_engine(OnGpu(), auto)
    assert (setback.of, setback.reason) == (
        "engine",
        "vllm is installed but not used: no such kernel",
    )
    with pytest.raises(ModelError, match="no such kernel"):
        load_engine(OnGpu(), settings.Generation(engine="vllm"))


def test_auto_is_our_own_engine_on_a_cpu(pristine, monkeypatch):
    stand_in(monkeypatch)
    monkeypatch.setattr(module, "is_installed", lambda: True)
    assert isinstance(load_engine(pristine.model, settings.Generation()), TorchEngine)
