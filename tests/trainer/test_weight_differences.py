"""Differences to the untouched weights: exact, small, and refused if they are damaged."""

import copy
import io
import json
import random
import struct
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker import settings
from worker.policy.policy import Policy, load
from worker.trainer import weight_differences
from worker.trainer.trainer import Trainer
from worker.trainer.weight_differences import find_base, open_file, read_from, write_to

SHAPES = {"a": (7, 5), "b": (), "c": (3,), "d": (0, 4), "e": (1, 1, 33)}
HEADER_BYTES = 48


def make(dtype: torch.dtype, seed: int = 1, shapes: Mapping[str, tuple] = SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def moved(base: Mapping[str, Tensor], share: float, seed: int = 2) -> dict[str, Tensor]:
    """Return weights of which about this share differs from the untouched ones."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(
            torch.rand(w.shape, generator=generator) < share,
            torch.randn(w.shape, generator=generator).to(w.dtype),
            w,
        )
        for name, w in base.items()
    }


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: w.shape for name, w in weights.items()}


def packed(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> bytes:
    stream = io.BytesIO()
    write_to(stream, weights, base)
    return stream.getvalue()


def is_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Return whether all bits are the same, also those of values that are not numbers."""
    return list(ours) == list(theirs) and all(
        torch.equal(one.view(torch.int16), other.view(torch.int16))
        for one, other in zip(ours.values(), theirs.values(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("piece", [4, 1 << 19])
def test_unpacked_weights_are_the_rounded_ones_bit_by_bit(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    base_dtype: torch.dtype,
    share: float,
    piece: int,
) -> None:
    monkeypatch.setattr(weight_differences, "PIECE_VALUES", piece)
    base = make(base_dtype)
    weights = {name: w.to(dtype) for name, w in moved(base, share).items()}
    content = packed(weights, base)
    unpacked = read_from(io.BytesIO(content), base, shapes_of(base))
    assert is_same(unpacked, {name: w.bfloat16() for name, w in weights.items()})


@given(
    st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535)), max_size=40),
    st.booleans(),
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_bits_come_back(pairs: list[tuple[int, int]], is_float: bool) -> None:
    """Also those of infinities and of what is not a number."""
    new, old = (
        torch.tensor([pair[i] - 32768 for pair in pairs], dtype=torch.int16).view(torch.bfloat16)
        for i in (0, 1)
    )
    weights = {"a": new.float() if is_float else new}
    unpacked = read_from(io.BytesIO(packed(weights, {"a": old})), {"a": old}, shapes_of(weights))
    assert is_same(unpacked, {"a": weights["a"].bfloat16()})


def test_few_changes_make_a_small_file(tmp_path: Path) -> None:
    base = make(torch.bfloat16, shapes={"a": (1000, 1000)})
    weights = {"a": base["a"].clone()}
    weights["a"].view(torch.int16)[:, ::50] += 1
    file = tmp_path / "difference"
    assert weight_differences.pack(weights, base, file).loss == 0
    assert file.stat().st_size < 0.05 * 2_000_000
    assert weight_differences.is_difference(file)
    assert is_same(weight_differences.unpack(file, base, shapes_of(base)), weights)


def test_rounding_loss_is_the_share_of_the_training_that_is_lost() -> None:
    base = {"a": torch.ones(1000)}
    loss = {
        step: write_to(io.BytesIO(), {"a": base["a"] + step}, base).loss
        for step in (2**-12, 2**-7, 2**-7 + 2**-11)
    }
    assert loss[2**-12] == 1.0  # far less than a step of bfloat16, 2 ** -7 here
    assert loss[2**-7] == 0.0
    assert 0.05 < loss[2**-7 + 2**-11] < 0.07


@pytest.fixture(scope="module")
def sound() -> tuple[dict[str, Tensor], bytes]:
    base = make(torch.bfloat16)
    return base, packed(moved(base, 0.5), base)


def test_every_truncation_is_refused(sound: tuple[dict[str, Tensor], bytes]) -> None:
    base, content = sound
    for length in range(len(content)):
        with pytest.raises(ValueError, match=r"truncated|not a difference"):
            read_from(io.BytesIO(content[:length]), base, shapes_of(base))


def test_stream_that_was_cut_and_declared_as_whole_is_refused(
    sound: tuple[dict[str, Tensor], bytes],
) -> None:
    base, content = sound
    for length in range(HEADER_BYTES, len(content) - 4):
        cut = content[:8] + struct.pack("<Q", length - HEADER_BYTES) + content[16:length]
        with pytest.raises(ValueError, match=r"truncated|damaged"):
            read_from(io.BytesIO(cut), base, shapes_of(base))


def test_damaged_byte_never_brings_other_weights(
    sound: tuple[dict[str, Tensor], bytes],
) -> None:
    """A few bits of zstd's own header have no meaning, so that the weights may be right."""
    base, content = sound
    right = read_from(io.BytesIO(content), base, shapes_of(base))
    num_right = 0
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            try:
                unpacked = read_from(io.BytesIO(damaged), base, shapes_of(base))
            except ValueError:
                continue
            assert is_same(unpacked, right)
            num_right += 1
    assert num_right < 16


def test_longer_file_is_refused(sound: tuple[dict[str, Tensor], bytes]) -> None:
    base, content = sound
    with pytest.raises(ValueError, match="too long"):
        read_from(io.BytesIO(content + b"x"), base, shapes_of(base))


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 100, random.Random(1).randbytes(1 << 16)])
def test_foreign_file_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a difference"):
        read_from(io.BytesIO(content), {}, {})


def frame(payload: bytes) -> io.BytesIO:
    header = weight_differences.MAGIC + struct.pack("<Q32s", len(payload), bytes(32))
    return io.BytesIO(header + payload)


class Decompressed:
    """Counts what is decompressed by all readers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_bytes = 0
        make_real, counter = zstandard.ZstdDecompressor, self

        class Reader:
            def __init__(self, real) -> None:
                self.real = real

            def __enter__(self):
                return self

            def __exit__(self, *_) -> None:
                self.real.close()

            def read(self, size: int) -> bytes:
                assert 0 < size <= 2 * weight_differences.PIECE_VALUES
                content = self.real.read(size)
                counter.num_bytes += len(content)
                return content

        class Decompressor:
            def __init__(self, **options) -> None:
                self.real = make_real(**options)

            def stream_reader(self, stream, **options) -> Reader:
                return Reader(self.real.stream_reader(stream, **options))

        monkeypatch.setattr(weight_differences.zstandard, "ZstdDecompressor", Decompressor)


def test_bomb_is_read_up_to_the_expected_size(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make(torch.bfloat16)
    bomb = frame(zstandard.compress(bytes(100_000_000)))
    counted = Decompressed(monkeypatch)
    with pytest.raises(ValueError, match="too long"):
        read_from(bomb, base, shapes_of(base))
    assert counted.num_bytes == 2 * sum(w.numel() for w in base.values()) + 1


def test_stream_that_wants_a_huge_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    payload = writer.compress(bytes(1 << 20)) + writer.flush()
    with pytest.raises(ValueError, match="damaged"):
        read_from(frame(payload), make(torch.bfloat16), shapes_of(make(torch.bfloat16)))


@pytest.mark.parametrize(
    "shapes",
    [
        {**SHAPES, "a": (5, 7)},  # as many values
        {**SHAPES, "a": (7, 6)},
        {**SHAPES, "c": (2,)},
        {n: SHAPES[n] for n in "bacde"},
        {n: SHAPES[n] for n in "abcd"},
        {**SHAPES, "f": (2,)},
    ],
)
def test_difference_of_another_model_is_refused(
    sound: tuple[dict[str, Tensor], bytes], shapes: dict[str, tuple]
) -> None:
    base = make(torch.bfloat16, shapes=shapes)
    with pytest.raises(ValueError, match=r"truncated|too long|other shapes"):
        read_from(io.BytesIO(sound[1]), base, shapes_of(base))


def test_difference_to_other_untouched_weights_is_refused(
    sound: tuple[dict[str, Tensor], bytes],
) -> None:
    base = {name: w.clone() for name, w in sound[0].items()}
    base["e"].view(-1)[7] += 1
    assert weight_differences.digest_of(base) != weight_differences.digest_of(sound[0])
    with pytest.raises(ValueError, match="untouched weights"):
        read_from(io.BytesIO(sound[1]), base, shapes_of(base))


def test_weights_that_do_not_fit_the_base_are_not_packed() -> None:
    base = make(torch.bfloat16)
    with pytest.raises(ValueError, match="e: missing"):
        packed({name: base[name] for name in "abcd"}, base)
    with pytest.raises(ValueError, match=r"c: \(2,\); expected \(3,\)"):
        packed({**base, "c": torch.zeros(2)}, base)


class OneAtATime(Mapping[str, Tensor]):
    """Gives tensors as files do; fails if one is asked for while another is still in memory."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.given: weakref.ref[Tensor] | None = None
        self.num_given = 0

    def __getitem__(self, name: str) -> Tensor:
        assert self.given is None or self.given() is None
        tensor = self.weights[name].clone()
        self.given = weakref.ref(tensor)
        self.num_given += 1
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


class Narrow(io.BytesIO):
    """A file that fails if much is written at once."""

    def write(self, content) -> int:
        assert len(content) <= zstandard.COMPRESSION_RECOMMENDED_OUTPUT_SIZE
        return super().write(content)


def test_memory_is_bounded_by_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_differences, "PIECE_VALUES", 1 << 14)
    shapes = dict.fromkeys("abcdef", (300, 400))
    base = make(torch.bfloat16, shapes=shapes)
    weights = moved(base, 1.0)
    stream = Narrow()
    real, sizes = weight_differences._encode, []

    def encode(bits, before):
        sizes.append(len(bits))
        return real(bits, before)

    monkeypatch.setattr(weight_differences, "_encode", encode)
    on_disk, trained = OneAtATime(base), OneAtATime(weights)
    write_to(stream, trained, on_disk)
    assert max(sizes) == 1 << 14
    assert sum(sizes) == 6 * 120_000
    Decompressed(monkeypatch)  # checks how much is read at once
    assert is_same(read_from(stream, OneAtATime(base), shapes_of(base)), weights)
    assert on_disk.num_given == trained.num_given == 6


@pytest.fixture(scope="module")
def pristine() -> Policy:
    torch.set_num_threads(1)
    return load(settings.Model(device="cpu"))


def make_trainer(pristine: Policy, folder: Path | None, **options: object) -> Trainer:
    policy = Policy(copy.deepcopy(pristine.model), pristine.tokenizer, pristine.name, folder)
    return Trainer(policy, settings.Trainer(**options), settings.Generation())  # type: ignore[arg-type]


def untouched(trainer: Trainer) -> dict[str, Tensor]:
    return {name: w.detach().bfloat16() for name, w in trainer.parameters.items()}


def test_base_is_read_from_the_folder_of_the_model(pristine: Policy) -> None:
    trainer = make_trainer(pristine, pristine.folder)
    base = find_base(trainer)
    assert is_same({name: w.bfloat16() for name, w in base.items()}, untouched(trainer))


def write_shards(folder: Path, weights: Mapping[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    place = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(weights)}
    for file in set(place.values()):
        save_file({n: w for n, w in weights.items() if place[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": place}))


def test_base_of_several_files_has_the_same_digest(pristine: Policy, tmp_path: Path) -> None:
    trainer = make_trainer(pristine, tmp_path)
    assert pristine.folder is not None
    weights = load_file(pristine.folder / "model.safetensors")
    write_shards(tmp_path, weights)
    base, whole = find_base(trainer), find_base(make_trainer(pristine, pristine.folder))
    assert list(base) == list(trainer.parameters)
    assert weight_differences.digest_of(base) == weight_differences.digest_of(whole)


@pytest.mark.parametrize("name", ["lm_head.weight", "embed_tokens.weight"])
def test_tied_weight_is_found_under_another_name(
    pristine: Policy, tmp_path: Path, name: str
) -> None:
    trainer = make_trainer(pristine, tmp_path)
    model = trainer.policy.model
    embedding = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is not embedding:
        model.get_output_embeddings().weight = embedding
        trainer = Trainer(trainer.policy, settings.Trainer(), settings.Generation())
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if p is embedding}
    assert len(names & trainer.parameters.keys()) == 1
    weights = {n: w for n, w in untouched(trainer).items() if n not in names}
    save_file({**weights, name: embedding.detach()}, tmp_path / "model.safetensors")
    base = find_base(trainer)
    assert is_same({n: w.bfloat16() for n, w in base.items()}, untouched(trainer))


def test_names_without_the_prefix_are_found(pristine: Policy, tmp_path: Path) -> None:
    """So are the files of GPT-2."""
    trainer = make_trainer(pristine, tmp_path)
    weights = {n.removeprefix("model."): w for n, w in untouched(trainer).items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert is_same(dict(find_base(trainer)), untouched(trainer))


@pytest.mark.parametrize("why", ["folder", "file", "garbage", "index", "missing", "shape"])
def test_base_that_is_not_there_has_a_reason(pristine: Policy, tmp_path: Path, why: str) -> None:
    trainer = make_trainer(pristine, None if why == "folder" else tmp_path)
    weights = untouched(trainer)
    name = next(iter(weights))
    file = tmp_path / "model.safetensors"
    if why == "garbage":
        file.write_bytes(b"x" * 100)
    elif why == "index":
        (tmp_path / "model.safetensors.index.json").write_text("[]")
    elif why in ("missing", "shape"):
        tensor = weights.pop(name)
        save_file(weights if why == "missing" else {**weights, name: tensor[1:].clone()}, file)
    expected = {"folder": "not in a folder", "missing": name, "shape": name, "index": "invalid"}
    with pytest.raises(ValueError, match=expected.get(why, str(tmp_path))):
        find_base(trainer)


def test_adapters_have_no_base(pristine: Policy) -> None:
    trainer = make_trainer(pristine, pristine.folder, lora=settings.Lora())
    with pytest.raises(ValueError, match="adapters"):
        find_base(trainer)


def test_base_that_vanishes_is_a_failure_of_ours(pristine: Policy, tmp_path: Path) -> None:
    """A ValueError would blame the peer."""
    trainer = make_trainer(pristine, tmp_path)
    weights = untouched(trainer)
    save_file(weights, tmp_path / "model.safetensors")
    base = find_base(trainer)
    file = tmp_path / "difference"
    weight_differences.pack(weights, base, file)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        weight_differences.unpack(file, base, shapes_of(weights))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        open_file(tmp_path / "model.safetensors")
