import random

import pytest
import torch
import transformers

from worker.policy import logprobs as logprobs_module
from worker.policy.logprobs import PromptGroup, Scorer, common_prefix, completion_logprobs

torch.set_num_threads(1)  # cores are shared; such models gain nothing from more

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Windows are shorter than the sequences below, so that they matter within and across prompt and
# completion.
FAMILIES = {
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**BASE)),
    "qwen2-sliding": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **BASE, use_sliding_window=True, sliding_window=6, max_window_layers=2
        )
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**BASE, head_dim=16)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**BASE, sliding_window=6)
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**BASE, head_dim=8)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **BASE,
            head_dim=8,
            sliding_window=6,
            attn_logit_softcapping=1.0,
            final_logit_softcapping=2.0,
        )
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **BASE,
            head_dim=8,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    ),
    # Keys of 16 numbers a head, values of 12.
    "deepseek": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **{**BASE, "num_key_value_heads": 4},
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
            first_k_dense_replace=4,
        )
    ),
}
# What these do, packing does not know: scaled logits, attention sinks, convolutions over
# neighbours.
UNPACKABLE = {
    "granite": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**BASE, logits_scaling=2.0)
    ),
    "gpt-oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **BASE, head_dim=8, num_local_experts=2, num_experts_per_tok=1, rope_parameters=None
        )
    ),
}


def make_model(make, dtype=torch.float32):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def make_groups(prefix_length=0):
    """Return groups of different lengths, of equal length, and of single tokens.

    All prompts begin with the same `prefix_length` tokens.
    """
    rng = random.Random(1)

    def tokens(count):
        return tuple(rng.randrange(97) for _ in range(count))

    prefix = tuple(range(prefix_length))
    return [
        PromptGroup(prefix + tokens(11), (tokens(9), tokens(9), tokens(9))),
        PromptGroup(prefix + tokens(3), (tokens(12), tokens(1), tokens(5), tokens(4))),
        PromptGroup(prefix + tokens(4), (tokens(1), tokens(1))),
    ]


def one_by_one(model, groups, temperature):
    """Score each completion in a forward pass of its own, without padding."""
    rows = []
    for prompt, completions in groups:
        for completion in completions:
            logits = (
                model(input_ids=torch.tensor([prompt + completion]))
                .logits[0, len(prompt) - 1 : -1]
                .float()
            )
            logprobs = (logits / temperature).log_softmax(-1)
            rows.append(logprobs[range(len(completion)), completion])
    return torch.cat(rows)


def gradients(model, logprobs):
    model.zero_grad()
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize(("recomputes", "prefix"), [(False, 0), (True, 0), (False, 20)])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_row_equals_every_sequence_by_itself(family, recomputes, prefix, monkeypatch):
    monkeypatch.setattr(logprobs_module, "_MAX_LOGITS", 97 * 7)  # logits in pieces of seven tokens
    model, groups = make_model(FAMILIES[family]), make_groups(prefix)
    expected = one_by_one(model, groups, 0.7)
    expected_gradients = gradients(model, expected)
    implementation = model.config._attn_implementation
    scorer = Scorer(model)
    assert scorer.is_packed
    scorer.recomputes = recomputes
    with scorer.passes():
        logprobs = scorer.logprobs(groups, 0.7)
        ours = gradients(model, logprobs)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    assert_same(ours, expected_gradients, 1e-5)
    assert (model.config._attn_implementation, model.training) == (implementation, False)
    assert not any(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", UNPACKABLE)
def test_model_that_can_not_be_packed_is_scored_in_rows(family, caplog, monkeypatch):
    monkeypatch.setattr(logprobs_module, "_MAX_LOGITS", 97 * 7)
    model, groups = make_model(UNPACKABLE[family]), make_groups()
    expected = one_by_one(model, groups, 0.7)
    expected_gradients = gradients(model, expected)
    scorer = Scorer(model)
    assert not scorer.is_packed
    assert "model is not packed" in caplog.text
    assert scorer.has_plain_head == (family == "gpt-oss")
    made = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: made.append(logits[..., 0])
    )
    with scorer.passes():
        logprobs = scorer.logprobs(groups, 0.7)
        ours = gradients(model, logprobs)
    # In pieces of seven tokens; where that can't be, of the completions and the one token before
    # them.
    expected_pieces = {"gpt-oss": 7, "granite": 9 * (20 - 3 + 1)}
    assert max(logits.numel() for logits in made) == expected_pieces[family]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    assert_same(ours, expected_gradients, 1e-4)
    assert scorer.count_tokens([(1,) * 3, (2,) * 5], [1, 2, 4]) == 3 * (5 + 4)


def test_bfloat16_row_is_as_near_to_float32_as_sequences_by_themselves():
    model, groups = make_model(FAMILIES["qwen2"]), make_groups()
    exact = one_by_one(model, groups, 1.0)
    model.to(torch.bfloat16)
    scorer = Scorer(model)
    with scorer.passes(), torch.no_grad():
        packed = scorer.logprobs(groups, 1.0)
    plain = one_by_one(model, groups, 1.0)
    assert packed.dtype == torch.float32
    assert (packed - exact).abs().max() < 2 * (plain - exact).abs().max() + 0.02


def test_no_token_sees_another_completion():
    model, groups = make_model(FAMILIES["llama"]), make_groups()
    scorer = Scorer(model)
    first, *others = groups[1].completions
    changed = PromptGroup(groups[1].prompt, (first, *(tuple(reversed(c)) for c in others)))
    with scorer.passes(), torch.no_grad():
        before = scorer.logprobs([groups[0], groups[1]], 1.0)
        after = scorer.logprobs([groups[2], changed], 1.0)
    torch.testing.assert_close(
        before[27 : 27 + len(first)], after[2 : 2 + len(first)], rtol=0, atol=1e-5
    )


def test_only_what_goes_through_the_model_is_counted():
    scorer = Scorer(make_model(FAMILIES["qwen2"]))
    assert scorer.count_tokens([(1,) * 3, (2,) * 5], [1, 2, 4]) == 3 + 5 + 1 + 2 + 4


def test_what_all_prompts_begin_with_goes_through_the_model_once():
    model, groups = make_model(FAMILIES["llama"]), make_groups(20)
    scorer, lengths = Scorer(model), []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, out: lengths.append(inputs[0].numel())
    )
    with scorer.passes(), torch.no_grad():
        scorer.logprobs(groups, 1.0)
    completions = [len(c) for group in groups for c in group.completions]
    prompts = 20 + 11 + 3 + 4
    assert lengths == [prompts + sum(completions) - len(completions)]  # last tokens predict nothing
    counted = scorer.count_tokens([group.prompt for group in groups], completions)
    assert counted == prompts + sum(completions)


def test_prompts_that_hardly_begin_alike_share_nothing():
    common = tuple(range(15))
    assert common_prefix([(*common, 50), (*common, 60)]) == 0
    assert common_prefix([(*common, 15, 50), (*common, 15, 60)]) == 16
    assert common_prefix([(*common, 15, 16), (*common, 15, 16, 17)]) == 16  # each keeps one
    assert common_prefix([(*common, 15, 16)]) == 0


def test_plain_rows_equal_one_sequence_at_a_time():
    model, groups = make_model(FAMILIES["qwen3"]), make_groups()
    completions = [c for group in groups for c in group.completions]
    rows = completion_logprobs(
        model, [g.prompt for g in groups], completions, [0] * 3 + [1] * 4 + [2] * 2, 0.7
    )
    assert rows.shape == (9, 12)
    flat = torch.cat([row[: len(c)] for row, c in zip(rows, completions, strict=True)])
    torch.testing.assert_close(flat, one_by_one(model, groups, 0.7), rtol=0, atol=1e-5)
    assert rows[4, 1:].abs().sum() == 0
