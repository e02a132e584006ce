"""The operations in C: exact on every processor, and replaced where they can't run."""

import errno
import functools
import math
import platform

import pytest
import torch
from tiny_engines import PROMPTS, answer, force, make_engine, make_model

from worker.errors import ModelError
from worker.policy.engines import native
from worker.policy.engines.decoder import LeanDecoder
from worker.policy.engines.torch_engine import TorchEngine


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
    compile_library, flags_seen = native.compile_library, []

    def compile_without_permission(compiler, flags):
        flags_seen.append(flags)
        library = compile_library(compiler, flags)
        return library if "-mno-amx-tile" in flags else WithoutTiles(library)

    monkeypatch.setattr(native, "compile_library", compile_without_permission)
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
