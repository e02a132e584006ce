"""Engines of small models with random weights, and what they are asked."""

import pytest
import torch
import transformers

from worker import settings
from worker.errors import ModelError
from worker.policy.engines import native
from worker.policy.engines.decoder import LeanDecoder
from worker.policy.engines.engine import Ending
from worker.policy.engines.hf_decoder import CachedDecoder
from worker.policy.engines.torch_engine import TorchEngine
from worker.policy.engines.transformers_engine import ReferenceEngine

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
ALIKE = [[*range(30, 60), *rest] for rest in ([7], [9] * 11, list(range(3, 21)))]
"""Prompts that begin with the same 30 tokens, which are computed once."""
NEVER = [False] * VOCABULARY


def make_model(family: str = "qwen2", **shape):
    torch.manual_seed(0)
    config, departures = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(
        config(**{**SHAPE, **departures, **shape})
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(
                4
            )  # random weights say the same of everything: make them say different things
    return model


def make_engine(name, model):
    if name == "reference":
        return ReferenceEngine(model)
    engine = TorchEngine(model, "float32")
    assert isinstance(engine.decoder, LeanDecoder)
    if name == "cached":
        engine.decoder = CachedDecoder(model)
    elif name == "lean":
        assert engine.decoder.native is not None  # tests run where a C compiler is
    elif name == "lean-torch":
        engine.decoder.native = None
    elif name == "lean-replayed":
        engine.decoder.replays, engine.decoder.compact_below = True, 0.5
    return engine


def answer(
    engine, prompts=PROMPTS, seed=0, end_ids=(1,), is_done=None, may_be_done=NEVER, **options
):
    generation = settings.Generation(
        **{"num_generations": 2, "max_completion_length": 20, **options}
    )
    ending = Ending(frozenset(end_ids), is_done or (lambda tokens: False), may_be_done)
    return engine.generate(prompts, generation, seed, ending)


def force(way, monkeypatch):
    """Return the operations in the format of HIVEWRIGHT_NATIVE; skip if it is unsupported."""
    monkeypatch.setenv("HIVEWRIGHT_NATIVE", way)
    try:
        return native.load()
    except ModelError as error:
        pytest.skip(str(error))
