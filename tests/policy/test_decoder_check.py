"""Tests of the check at an engine's start: correct decoders are used, others refused by name."""

import pytest
import torch
import transformers
from tiny_engines import PROMPTS, answer, force, make_model

from worker.errors import ModelError
from worker.policy.engines import decoder_check, native, torch_engine
from worker.policy.engines.decoder import LeanDecoder
from worker.policy.engines.hf_decoder import CachedDecoder
from worker.policy.engines.torch_engine import TorchEngine
from worker.policy.engines.transformers_engine import ReferenceEngine

torch.set_num_threads(1)

REAL = [[5, 6, 7, 8, 9, 10, 11], list(range(3, 21)), [9] * 11]
OUTLIERS = 50.0


def add_outliers(model):
    """Make a few channels of each layer's input 50 times larger, as in trained models."""
    with torch.no_grad():
        for layer in model.model.layers:
            is_gemma = hasattr(layer, "pre_feedforward_layernorm")
            norms = (
                layer.input_layernorm,
                layer.pre_feedforward_layernorm if is_gemma else layer.post_attention_layernorm,
            )
            for norm in norms:
                norm.weight[[3, 17]] = OUTLIERS
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                mlp.gate_proj,
                mlp.up_proj,
            ):
                linear.weight[:, [3, 17]] /= OUTLIERS
    return model


WIDE = {"hidden_size": 192, "intermediate_size": 256}
SHAPES = {
    "smollm2": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64}),
    "qwen2.5": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "llama3": ("llama", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
}


@pytest.mark.parametrize("way", [None, *native.WAYS])
@pytest.mark.parametrize("name", SHAPES)
def test_lean_decoder_in_16_bits_takes_weights_with_outliers(name, way, monkeypatch):
    if way is not None:
        force(way, monkeypatch)
    family, shape = SHAPES[name]
    model = add_outliers(make_model(family, **WIDE, **shape))
    decoder = TorchEngine(model, "bfloat16", prompts=REAL).decoder
    assert isinstance(decoder, LeanDecoder)
    assert decoder.weights.dtype == torch.bfloat16


def test_decoder_is_judged_by_what_its_precision_costs_transformers():
    model = make_model()
    trial = torch_engine._Trial(model, REAL)
    error, allowed = trial.judge(LeanDecoder(model, torch.bfloat16), torch.bfloat16, 1.5)
    theirs = decoder_check.difference(
        decoder_check.plain_logits(model.bfloat16(), REAL, torch.bfloat16), trial._exact
    )
    assert 0 < error < allowed
    assert allowed == pytest.approx(1.5 * theirs + 1e-3, rel=0.3)


def test_float32_is_tried_where_16_bits_are_refused(monkeypatch, caplog):
    monkeypatch.setattr(
        decoder_check, "allowed_error", lambda theirs, factor: 0.0 if theirs else 1e-3
    )
    engine = TorchEngine(make_model(), "bfloat16", prompts=REAL)
    decoder = engine.decoder
    assert isinstance(decoder, LeanDecoder)
    assert decoder.weights.dtype == torch.float32
    assert [setback.of for setback in engine.setbacks] == ["engine", "precision"]
    reason = engine.setbacks[0].reason
    assert reason.startswith("the lean decoder in torch.bfloat16 is not used: its error is 0.")
    assert (
        "lean decoder not used reason=disagreement family=qwen2 dtype=torch.bfloat16" in caplog.text
    )


def test_copy_in_float32_that_memory_does_not_take_is_not_tried(monkeypatch, caplog):
    model = make_model().bfloat16()
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: output * 1.5)
    monkeypatch.setattr(torch_engine.memory, "free", lambda device: 1000)
    engine = TorchEngine(model, "bfloat16", prompts=REAL)
    assert isinstance(engine.decoder, CachedDecoder)
    # transformers' forward also computes in bfloat16
    assert {setback.of for setback in engine.setbacks} == {"engine"}
    assert "0 MiB free" in engine.setbacks[-1].reason
    assert (
        "lean decoder not tried dtype=torch.float32 reason=its copy of the weights takes"
        in caplog.text
    )


def test_fallback_that_says_something_else_than_a_plain_pass_is_refused_by_name(monkeypatch):
    """Use a model with wrong cached steps: its layers depend on the number of tokens at once."""
    model = make_model()
    monkeypatch.setattr(torch_engine, "find_obstacle", lambda model: "family unheard of")
    model.model.layers[1].register_forward_hook(
        lambda module, inputs, output: output * (1.5 if output.shape[1] == 1 else 1.0)
    )
    with pytest.raises(
        ModelError,
        match=r"type qwen2 \(Qwen2ForCausalLM\): .* Set generation.engine to transformers",
    ):
        TorchEngine(model, prompts=REAL)


@pytest.mark.parametrize("name", ["MambaConfig", "RwkvConfig"])
def test_model_with_a_cache_of_its_own_is_refused_with_a_way_that_works(name):
    torch.manual_seed(0)
    config = getattr(transformers, name)(
        vocab_size=120,
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(
        ModelError, match=f"type {config.model_type} .*generation.engine to transformers"
    ):
        TorchEngine(model, prompts=REAL)
    assert len(answer(ReferenceEngine(model), PROMPTS[:1])[0]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_leaves_the_model_as_it_is(dtype):
    model = make_model("gemma3").to(dtype)
    before = [(p.data_ptr(), p.dtype, p.detach().clone()) for p in model.parameters()]
    exact = decoder_check.plain_logits(model, REAL, torch.float32)
    rounded = decoder_check.plain_logits(model, REAL, torch.bfloat16)
    for parameter, (address, kind, values) in zip(model.parameters(), before, strict=True):
        assert (parameter.data_ptr(), parameter.dtype) == (address, kind)
        assert torch.equal(parameter, values)
    assert not torch.equal(exact, rounded)
    assert torch.equal(exact, decoder_check.plain_logits(model.float(), REAL, torch.float32))


def test_long_and_short_prompts_are_made_fit():
    assert decoder_check.shorten([[1] * 500, [2] * 4, [3] * 500, [4] * 5, [5] * 50]) == [
        [1] * 96,
        [3] * 32,
        [4] * 5,
    ]
