"""Our engine answers as transformers does, with each of its decoders."""

import weakref

import graph_stand_in
import pytest
import torch
import transformers
from tiny_engines import (
    ALIKE,
    FAMILIES,
    PROMPTS,
    SHAPE,
    VOCABULARY,
    answer,
    make_engine,
    make_model,
)

from worker import settings
from worker.policy.engines import cuda_graph
from worker.policy.engines.architecture import UnknownArchitectureError
from worker.policy.engines.decoder import LeanDecoder
from worker.policy.engines.hf_decoder import CachedDecoder
from worker.policy.engines.torch_engine import TorchEngine, load_engine
from worker.policy.engines.transformers_engine import ReferenceEngine
from worker.policy.logprobs import completion_logprobs


@pytest.fixture(autouse=True)
def cuda_graphs(monkeypatch):
    """Replace CUDA graphs, which need a GPU, by a stand-in."""
    monkeypatch.setattr(cuda_graph, "record", graph_stand_in.record)


@pytest.mark.parametrize("name", ["lean", "lean-torch", "lean-replayed", "cached", "reference"])
@pytest.mark.parametrize("prompts", [PROMPTS, ALIKE], ids=["unlike", "alike"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_those_of_transformers(family, prompts, name):
    model = make_model(family)
    answers = answer(make_engine(name, model), prompts, top_k=1)
    for prompt, rows in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        reference = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
        )
        reference = reference[0, len(prompt) :].tolist()
        assert [list(row.token_ids) for row in rows] == [reference] * 2
        logits = model(torch.tensor([prompt + reference])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(reference)[:, None])[:, 0].tolist()
        assert rows[0].logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["lean", "lean-torch", "lean-replayed"])
@pytest.mark.parametrize(
    ("family", "head_dim"),
    [*((family, 8) for family in FAMILIES), ("qwen3", 16), ("gemma2", 24), ("llama", 64)],
)
def test_lean_and_cached_decoders_sample_the_same_while_rows_end(family, head_dim, name):
    model = make_model(family, head_dim=head_dim)
    options = {
        "num_generations": 6,
        "end_ids": tuple(range(4, 16)),
        "max_completion_length": 40,
        "temperature": 1.3,
    }
    prompts = [*PROMPTS, PROMPTS[0]]
    lean, cached = (answer(make_engine(n, model), prompts, **options) for n in (name, "cached"))
    assert len({len(row.token_ids) for group in lean for row in group}) > 5
    for ours, theirs in zip(
        (r for g in lean for r in g), (r for g in cached for r in g), strict=True
    ):
        assert (ours.token_ids, ours.finished) == (theirs.token_ids, theirs.finished)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", ["lean", "lean-torch", "lean-replayed"])
@pytest.mark.parametrize(("family", "window"), [("qwen2", {}), ("mistral", {"sliding_window": 66})])
def test_prompts_that_fill_their_room_hide_nothing_until_the_window_does(family, window, name):
    model = make_model(family, **window)
    prompts = [[(7 * i + k) % 100 + 5 for i in range(64)] for k in (1, 2)]
    options = {"max_completion_length": 40, "end_ids": (), "temperature": 1.3}
    ours, theirs = (answer(make_engine(n, model), prompts, **options) for n in (name, "cached"))
    for our, their in zip(
        (r for g in ours for r in g), (r for g in theirs for r in g), strict=True
    ):
        assert our.token_ids == their.token_ids
        assert our.logprobs == pytest.approx(
            their.logprobs, abs=1e-5
        )  # one position more or less shows


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_scaled_rotations_are_those_of_transformers(rope):
    parameters = {
        "rope_type": rope,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**SHAPE, rope_parameters=parameters)
    ).eval()
    lean, cached = (answer(make_engine(name, model), top_k=1) for name in ("lean", "cached"))
    assert [row.token_ids for group in lean for row in group] == [
        row.token_ids for group in cached for row in group
    ]


def test_biases_are_part_of_the_products():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    lean, cached = (answer(make_engine(name, model), top_k=1) for name in ("lean", "cached"))
    assert [row.token_ids for group in lean for row in group] == [
        row.token_ids for group in cached for row in group
    ]


def test_caches_grow_past_their_first_room():
    model = make_model()
    prompts = [[5, 6, 7], [8] * 4]
    rows = {}
    for name in ("lean", "lean-torch", "lean-replayed", "cached"):
        (group, _) = answer(
            make_engine(name, model), prompts, max_completion_length=200, end_ids=(), top_k=1
        )
        rows[name] = [row.token_ids for row in group]
    assert len(rows["lean"][0]) == 200
    assert rows["lean"] == rows["lean-torch"] == rows["lean-replayed"] == rows["cached"]


def test_steps_that_can_not_be_recorded_are_computed_one_by_one_and_the_log_says_so_once(
    monkeypatch, caplog
):
    def record(work, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    model = make_model()
    monkeypatch.setattr(cuda_graph, "record", record)
    engine = make_engine("lean-replayed", model)
    first, second, plain = answer(engine), answer(engine), answer(make_engine("lean-torch", model))
    assert first == second
    # It looks at all keys that there is room for: other shapes, which some processors add up in
    # another order.
    for ours, theirs in zip(
        (r for g in first for r in g), (r for g in plain for r in g), strict=True
    ):
        assert (ours.token_ids, ours.finished) == (theirs.token_ids, theirs.finished)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    assert caplog.text.count("CUDA graphs not used reason=operation not permitted") == 1


@torch.no_grad()
def test_batch_is_gone_when_its_answers_are_there():
    """Check that caches, most of a GPU's memory, are freed without the garbage collector."""
    decoder = make_engine("lean-replayed", make_model()).decoder
    batch, _ = decoder.start(PROMPTS, 8)
    for _ in range(3):
        batch.step(torch.tensor([4, 5, 6]))
    seen = weakref.ref(batch)
    del batch
    assert seen() is None


def test_engine_follows_the_weights_of_the_model():
    model = make_model()
    engine = make_engine("lean", model)
    before = answer(engine, top_k=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model(torch.tensor([PROMPTS[2]])).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    after = answer(engine, top_k=1)
    assert after != before
    assert after == answer(make_engine("lean", model), top_k=1)
    model.load_state_dict(make_model().state_dict())  # as a checkpoint is restored
    assert answer(engine, top_k=1) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_that_changed_is_noticed(dtype):
    """Change a single number, as a small step may do with bfloat16 weights."""
    model = make_model().to(dtype)
    decoder = LeanDecoder(model, dtype)
    _, before = decoder.start(PROMPTS, 4)
    with torch.no_grad():
        weight = model.model.layers[-1].mlp.down_proj.weight
        weight[3, 5] += 1.0
    _, after = decoder.start(PROMPTS, 4)
    assert not torch.equal(before, after)


def test_engine_computes_in_bfloat16_when_asked():
    model = make_model()
    engine = TorchEngine(model, "bfloat16")
    assert engine.decoder.weights.dtype == torch.bfloat16
    exact = answer(make_engine("lean", model), max_completion_length=1, end_ids=(), top_k=1)
    rounded = answer(engine, max_completion_length=1, end_ids=(), top_k=1)
    assert exact != rounded
    for ours, theirs in zip(
        (r for g in exact for r in g), (r for g in rounded for r in g), strict=True
    ):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=0.1)


def test_unknown_family_is_decoded_by_transformers(caplog):
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        **{
            key: value
            for key, value in SHAPE.items()
            if key not in ("num_key_value_heads", "head_dim")
        }
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnknownArchitectureError, match="family gpt_neox"):
        LeanDecoder(model, torch.float32)
    with caplog.at_level("INFO"):
        engine = TorchEngine(model)
    assert isinstance(engine.decoder, CachedDecoder)
    assert "lean decoder not used reason=family gpt_neox" in caplog.text
    assert len(answer(engine)[0]) == 2


def test_layer_of_another_type_is_decoded_by_transformers():
    model = make_model()
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(UnknownArchitectureError, match="up_proj of type Sequential"):
        LeanDecoder(model, torch.float32)


def test_disagreement_with_transformers_is_named_and_its_forward_used(caplog):
    model = make_model()
    # A change that the lean decoder can't see.
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: output * 1.5)
    engine = TorchEngine(model)
    assert isinstance(engine.decoder, CachedDecoder)
    assert (
        "lean decoder not used reason=disagreement family=qwen2 dtype=torch.float32" in caplog.text
    )


def test_settings_choose_the_engine():
    model = make_model()
    assert isinstance(load_engine(model, settings.Generation()), TorchEngine)
    assert isinstance(load_engine(model, settings.Generation(engine="torch")), TorchEngine)
    assert isinstance(
        load_engine(model, settings.Generation(engine="transformers")), ReferenceEngine
    )


def test_reference_follows_the_settings_and_not_what_the_model_says_of_sampling():
    model = make_model()
    expected = answer(ReferenceEngine(model))
    own = model.generation_config
    own.min_p, own.no_repeat_ngram_size, own.typical_p, own.min_new_tokens = 1.0, 1, 0.1, 7
    assert answer(ReferenceEngine(model)) == expected
    assert model.generation_config is own


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_of_given_completions_equal_one_plain_pass(family):
    model = make_model(family)
    completions = [[4, 5, 6, 1], [7], [8] * 13]
    ours = completion_logprobs(model, PROMPTS, completions, [2, 0, 1], temperature=0.7)
    assert ours.shape == (3, 13)
    for row, (completion, prompt) in enumerate(
        zip(completions, (PROMPTS[2], PROMPTS[0], PROMPTS[1]), strict=True)
    ):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(ours[row, : len(completion)], expected, atol=1e-4, rtol=1e-4)
        assert not ours[row, len(completion) :].any()


def test_same_seed_gives_same_answers_and_another_seed_others():
    for name in ("lean", "cached", "reference"):
        engine = make_engine(name, make_model())
        assert answer(engine, seed=3) == answer(engine, seed=3)
        assert answer(engine, seed=3) != answer(engine, seed=4)


def test_answers_do_not_depend_on_when_other_rows_finish():
    engine = make_engine("lean", make_model())
    free = answer(engine, num_generations=4, end_ids=())
    # Rows end early, at different steps; the others must not change.
    may_be_done = [token < 30 for token in range(VOCABULARY)]
    stopped = answer(
        engine, num_generations=4, end_ids=(), is_done=lambda t: t[-1] < 30, may_be_done=may_be_done
    )
    lengths = set()
    for whole, cut in zip(
        (r for g in free for r in g), (r for g in stopped for r in g), strict=True
    ):
        assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
        assert cut.finished == (cut.token_ids[-1] < 30)
        lengths.add(len(cut.token_ids))
    assert len(lengths) > 3


@pytest.mark.parametrize("name", ["lean", "cached", "reference"])
def test_row_ends_with_its_end_token_or_unfinished_at_the_limit(name):
    engine = make_engine(name, make_model())
    groups = answer(engine, num_generations=16, end_ids=tuple(range(40)), max_completion_length=6)
    rows = [row for group in groups for row in group]
    for row in rows:
        assert len(row.token_ids) == len(row.logprobs) <= 6
        assert row.finished == (row.token_ids[-1] < 40)
        assert all(token >= 40 for token in row.token_ids[:-1])
        assert row.finished or len(row.token_ids) == 6
    assert {row.finished for row in rows} == {True, False}


def test_no_prompt_gives_no_answer():
    for name in ("lean", "reference"):
        assert answer(make_engine(name, make_model()), prompts=[]) == []
