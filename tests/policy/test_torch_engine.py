import errno
import functools
import math
import platform
import random
import weakref
from collections import Counter

import graph_stand_in
import pytest
import torch
import transformers

from worker import settings
from worker.errors import ModelError
from worker.policy.engines import cuda_graph, native
from worker.policy.engines.architecture import UnknownArchitectureError
from worker.policy.engines.decoder import LeanDecoder
from worker.policy.engines.engine import Ending
from worker.policy.engines.hf_decoder import CachedDecoder
from worker.policy.engines.sampling import Sampler
from worker.policy.engines.torch_engine import TorchEngine, load_engine
from worker.policy.engines.transformers_engine import ReferenceEngine
from worker.policy.logprobs import completion_logprobs

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


@pytest.fixture(autouse=True)
def cuda_graphs(monkeypatch):
    """Replace CUDA graphs, which need a GPU, by a stand-in."""
    monkeypatch.setattr(cuda_graph, "record", graph_stand_in.record)


def answer(
    engine, prompts=PROMPTS, seed=0, end_ids=(1,), is_done=None, may_be_done=NEVER, **options
):
    generation = settings.Generation(
        **{"num_generations": 2, "max_completion_length": 20, **options}
    )
    ending = Ending(frozenset(end_ids), is_done or (lambda tokens: False), may_be_done)
    return engine.generate(prompts, generation, seed, ending)


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
    assert caplog.text.count("steps are not replayed reason=operation not permitted") == 1


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


def force(way, monkeypatch):
    """Return the operations in the format of HIVEWRIGHT_NATIVE; skip if it is unsupported."""
    monkeypatch.setenv("HIVEWRIGHT_NATIVE", way)
    try:
        return native.load()
    except ModelError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("way", [*native.WAYS, "none"])
def test_engine_computes_in_the_way_that_the_environment_names(way, monkeypatch):
    functions = force(way, monkeypatch)
    model = make_model()
    engine = TorchEngine(model, "auto" if way == "none" else "bfloat16", prompts=PROMPTS)
    assert isinstance(engine.decoder, LeanDecoder)
    assert engine.decoder.native is functions
    assert (functions is None) == (way == "none")
    if functions is not None:
        assert engine.decoder.weights.layers[0].qkv._weight._functions is functions
    exact, ours = (
        answer(e, max_completion_length=1, top_k=1) for e in (make_engine("cached", model), engine)
    )
    assert [r.token_ids for g in exact for r in g] == [r.token_ids for g in ours for r in g]


def test_way_that_the_machine_has_not_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setenv("HIVEWRIGHT_NATIVE", "float16")
    with pytest.raises(
        ModelError,
        match=r"HIVEWRIGHT_NATIVE: float16 is not available here: .*no float16 arithmetic",
    ):
        native.load("-mno-avx512fp16" if platform.machine() == "x86_64" else "-DNOTHING")
    monkeypatch.setenv("HIVEWRIGHT_NATIVE", "int8")
    with pytest.raises(
        ModelError,
        match="HIVEWRIGHT_NATIVE: got 'int8'; expected amx, int16, float16, bfloat16, none or",
    ):
        native.load()


class WithoutTiles:
    """A library whose request for tiles fails."""

    def __init__(self, library):
        self._library = library
        self.ask_for_tiles = lambda: errno.EPERM

    def __getattr__(self, name):
        return getattr(self._library, name)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has AMX")
def test_kernel_that_refuses_tiles_leaves_the_next_way(monkeypatch, caplog):
    compile_library, flags_seen = native._compile, []

    def compile_without_permission(compiler, flags):
        flags_seen.append(flags)
        library = compile_library(compiler, flags)
        return library if "-mno-amx-tile" in flags else WithoutTiles(library)

    monkeypatch.setattr(native, "_compile", compile_without_permission)
    monkeypatch.setattr(native, "_load", functools.cache(native._load.__wrapped__))
    monkeypatch.setenv("HIVEWRIGHT_NATIVE", "auto")
    weight, x = torch.randn(20, 40), torch.randn(3, 40)
    product = native.Panels(weight, None, native.load())(x)
    assert (product - x @ weight.T).norm() < 0.01 * product.norm()
    assert flags_seen[1] == ("-mno-amx-tile",)
    assert (
        "AMX not used reason=the kernel refuses AMX's tiles: Operation not permitted" in caplog.text
    )
    monkeypatch.setenv("HIVEWRIGHT_NATIVE", "amx")
    with pytest.raises(ModelError, match="HIVEWRIGHT_NATIVE: amx is not available here: "):
        native.load()


LESSER = {
    "without AMX": ["-mno-amx-tile"],
    "without float16": ["-mno-amx-tile", "-mno-avx512fp16"],
    "with AVX2": ["-mno-avx512f"],
    "with AVX": ["-mno-avx2"],
    "without AVX": ["-mno-avx"],
}


@pytest.fixture(params=["this machine's", *native.WAYS, *LESSER])
def functions(request, monkeypatch):
    """Compile the operations for this machine in each format, and for lesser processors."""
    if request.param == "this machine's":
        return native.load()
    if request.param in native.WAYS:
        return force(request.param, monkeypatch)
    if platform.machine() != "x86_64":
        pytest.skip("only x86-64 has others")
    return native.load(*LESSER[request.param])


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs"), [(7, 20), (128, 448), (600, 1001), (1, 1), (33, 17)]
)
def test_product_with_16_bit_weights_is_as_exact_as_these(
    functions, num_inputs, num_outputs, has_bias
):
    torch.manual_seed(0)
    weight = torch.randn(num_outputs, num_inputs)
    bias = torch.randn(num_outputs) if has_bias else None
    panels = native.Panels(weight, bias, functions)
    for num_rows in range(1, 41):
        x = torch.randn(num_rows, num_inputs)
        exact = linear(x.double(), weight.double(), bias)
        rounding = linear(x.double(), weight.bfloat16().double(), bias) - exact
        bound = 1.1 * rounding.norm()
        assert (panels(x).double() - exact).norm() < bound + 1e-2 * exact.norm() * (num_inputs == 1)


def linear(x, weight, bias):
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.double())


def test_tiles_and_torch_s_own_products_take_turns(monkeypatch):
    """Alternate with oneDNN, which also configures the tiles of a thread."""
    functions = force("amx", monkeypatch)
    torch.manual_seed(0)
    weight, x = torch.randn(320, 640), torch.randn(16, 640)
    panels, exact = native.Panels(weight, None, functions), x @ weight.T
    for num_rows in (16, 3, 40, 16):
        rows = x.repeat(3, 1)[:num_rows]
        theirs = torch.nn.functional.linear(rows.bfloat16(), weight.bfloat16()).float()
        for product in (panels(rows), theirs):
            assert (product - exact.repeat(3, 1)[:num_rows]).norm() < 0.01 * product.norm()


def test_panels_take_another_weight_of_the_same_shape(functions):
    torch.manual_seed(0)
    first, second, x = torch.randn(40, 70), torch.randn(40, 70), torch.randn(3, 70)
    panels = native.Panels(first, None, functions)
    panels.fill(second, torch.ones(40))
    assert torch.equal(panels(x), native.Panels(second, torch.ones(40), functions)(x))


@pytest.mark.parametrize("size", [1e-15, 1e-6, 1e5, 1e15])
def test_numbers_beyond_float16_are_multiplied_as_exactly_as_others(functions, size):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 200), torch.randn(40, 200)
    x[1] *= size
    weight[1] *= size
    x[2, 5] = 1e4  # some families have such a number in each row
    x, weight = x.double(), weight.double()
    error = native.Panels(weight.float(), None, functions)(x.float()).double() - x @ weight.T
    assert (error.abs() < 2e-3 * x.norm(dim=1)[:, None] * weight.norm(dim=1)).all()


@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 64), ((3, 1), 24), ((2, 2), 10)])
def test_every_processor_samples_the_same(functions, heads, head_dim):
    shape = {
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim,
        "hidden_size": 48,
    }
    model = make_model("gemma2", sliding_window=20, **shape)
    options = {"num_generations": 6, "max_completion_length": 40, "temperature": 1.3}
    engine = make_engine("lean", model)
    engine.decoder.native = functions
    ours, theirs = (answer(e, **options) for e in (engine, make_engine("cached", model)))
    for row, expected in zip(
        (r for g in ours for r in g), (r for g in theirs for r in g), strict=True
    ):
        assert row.token_ids == expected.token_ids
        assert row.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_product_with_a_number_that_is_not_finite_is_not_finite(functions, value):
    x, weight = torch.ones(2, 64), torch.ones(3, 64)
    x[0, 9] = value
    product = native.Panels(weight, None, functions)(x)
    assert not product[0].isfinite().any()
    assert product[1].tolist() == [64.0] * 3


@pytest.mark.parametrize(
    ("compiler", "said"),
    [(None, "no C compiler"), ("/bin/false", "/bin/false says no message"), ("/no/cc", "/no/cc")],
)
def test_without_a_compiler_torch_does_it_all_and_the_log_says_so(
    monkeypatch, caplog, compiler, said
):
    monkeypatch.setattr(native.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(native, "_load", functools.cache(native._load.__wrapped__))
    with caplog.at_level("INFO"):
        engine = TorchEngine(make_model())
    assert engine.decoder.native is None
    has_amx = torch.cpu._is_amx_tile_supported()
    assert engine.decoder.weights.dtype == (torch.bfloat16 if has_amx else torch.float32)
    assert said in caplog.text
    assert len(answer(engine)[0]) == 2


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
