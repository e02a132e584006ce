"""Pack whole weights as a compressed difference to the untouched model's weights, and unpack them.

At the learning rates of RL few bfloat16 values change, so the difference is far smaller than the
weights. Weights of another type are rounded to bfloat16 first. A file has a header (magic bytes,
the length of the rest, a SHA-256 of names, shapes and values), then one zstd stream: for each
parameter, in the trainer's order, by how many steps of bfloat16 each value was moved. Files of
peers are untrusted: no more is decompressed than the expected number of bytes, and the digest also
shows that both sides have the same untouched weights.
"""

import hashlib
import io
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import zstandard
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.trainer.trainer import Trainer

MAGIC = b"HWDIFF1\n"
PIECE_VALUES = 1 << 19
"""Number of values that are compared, compressed or decompressed at once."""
Bits = np.ndarray[tuple[int], np.dtype[np.uint16]]
"""The bits of bfloat16 values."""
_HEADER = struct.Struct("<8sQ32s")
_LEVEL = 3
_MAX_WINDOW_BYTES = 8 << 20
"""Largest window that a stream may ask the decompressor to keep in memory; level 3 uses 2 MiB."""
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"


class WeightsOnDisk(Mapping[str, Tensor]):
    """Tensors in safetensors files, by name. Each access reads one; nothing is kept in memory.

    `places`: for each name the file, and the name in it. An access raises OSError if that file
    can't be read.
    """

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._places[name]
        try:
            with safe_open(file, framework="pt") as tensors:
                tensor: Tensor = tensors.get_tensor(key)
                return tensor
        except SafetensorError as error:
            raise OSError(f"{file}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_file(file: Path) -> WeightsOnDisk:
    """Return the tensors in one safetensors file. Raises OSError if it can't be read."""
    return WeightsOnDisk({key: (file, key) for key in _shapes_in(file)})


def find_base(trainer: Trainer) -> WeightsOnDisk:
    """Return the untouched weights of a trainer without adapters, in the order of its parameters.

    Raises ValueError with the reason if they are not all on disk.
    """
    folder = trainer.policy.folder
    if trainer.lora is not None or folder is None:
        raise ValueError("adapters" if trainer.lora else "the model's files are not in a folder")
    try:
        places, shapes = _list_folder(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from None
    found = {}
    for name, names in _names_of(trainer).items():
        shape = trainer.parameters[name].shape
        fitting = [each for each in names if shapes.get(each) == shape]
        if not fitting:
            raise ValueError(f"{name} of shape {tuple(shape)} is not in {folder}")
        found[name] = places[fitting[0]]
    return WeightsOnDisk(found)


def _list_folder(folder: Path) -> tuple[dict[str, tuple[Path, str]], dict[str, torch.Size]]:
    """Return places and shapes of the tensors in a model's folder.

    Raises OSError if a file can't be read, ValueError for an invalid index.
    """
    files = [folder / _WHOLE]
    if not files[0].exists() and (folder / _INDEX).exists():
        try:
            names = set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
            files = [folder / name for name in sorted(names)]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{_INDEX}: invalid: {error!r}") from None
    places, shapes = {}, {}
    for file in files:
        for key, shape in _shapes_in(file).items():
            places[key], shapes[key] = (file, key), shape
    return places, shapes


def _shapes_in(file: Path) -> dict[str, torch.Size]:
    try:
        with safe_open(file, framework="pt") as tensors:
            keys = list(tensors.keys())
            return {key: torch.Size(tensors.get_slice(key).get_shape()) for key in keys}
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from None


def _names_of(trainer: Trainer) -> dict[str, list[str]]:
    """Return for each parameter the names that a file may have it under, the likeliest first.

    These are the names of all layers that share it (tied weights), each also without the prefix
    that files of a model without a head lack.
    """
    model = trainer.policy.model
    prefix = f"{model.base_model_prefix}."
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    names = {}
    for name, parameter in trainer.parameters.items():
        aliases = list(dict.fromkeys([name, *shared[id(parameter)]]))
        names[name] = [*aliases, *(alias.removeprefix(prefix) for alias in aliases)]
    return names


def digest_of(base: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of all untouched values as bfloat16. Raises OSError."""
    digest = hashlib.sha256()
    for tensor in base.values():
        for piece in _pieces_of(tensor):
            digest.update(_bits_of(piece).data)
    return digest.hexdigest()


@dataclass
class Rounding:
    """Sums of squares over all values: of what training changed, and of what rounding changed."""

    trained: float = 0.0
    lost: float = 0.0

    @property
    def loss(self) -> float:
        """The size of the rounding errors as a share of the size of what training changed.

        0 for bfloat16 weights; infinite if only rounding changes anything.
        """
        if not self.lost:
            return 0.0
        return math.sqrt(self.lost / self.trained) if self.trained else math.inf

    def see(
        self,
        new: Tensor,
        untouched: Tensor,
    ) -> None:
        if new.dtype == torch.bfloat16:
            return  # nothing is rounded
        new = new.float()
        self.trained += float((new - untouched.float()).square().sum(dtype=torch.float64))
        self.lost += float((new - new.bfloat16().float()).square().sum(dtype=torch.float64))


def pack(
    weights: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    output: Path,
) -> Rounding:
    """Write the difference between weights and untouched weights to a file, and flush it to disk.

    The order is that of `base`. Returns how much of the training was lost. Raises OSError, and
    ValueError if `weights` lacks a name or has another shape; then the file may be incomplete.
    """
    with output.open("wb") as stream:
        rounding = write_to(stream, weights, base)
        stream.flush()
        os.fsync(stream.fileno())
    return rounding


def write_to(
    stream: BinaryIO,
    weights: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
) -> Rounding:
    """Write the file of `pack` to a stream that can seek, from its position 0; return as it does.

    The header is written last, so that an incomplete file has no magic bytes.
    """
    digest, rounding = hashlib.sha256(), Rounding()
    stream.write(bytes(_HEADER.size))
    with zstandard.ZstdCompressor(level=_LEVEL).stream_writer(stream, closefd=False) as packed:
        for name in base:
            if name not in weights:
                raise ValueError(f"{name}: missing")
            _write_tensor(packed, name, weights[name], base[name], digest, rounding)
    num_bytes = stream.tell() - _HEADER.size
    stream.seek(0)
    stream.write(_HEADER.pack(MAGIC, num_bytes, digest.digest()))
    return rounding


def _write_tensor(
    packed: zstandard.ZstdCompressionWriter,
    name: str,
    new: Tensor,
    untouched: Tensor,
    digest: "hashlib._Hash",
    rounding: Rounding,
) -> None:
    if new.shape != untouched.shape:
        raise ValueError(f"{name}: {tuple(new.shape)}; expected {tuple(untouched.shape)}")
    digest.update(_describe(name, new.shape))
    for piece, before in zip(_pieces_of(new), _pieces_of(untouched), strict=True):
        rounding.see(piece, before)
        bits = _bits_of(piece)
        digest.update(bits.data)
        packed.write(_encode(bits, _bits_of(before)))


def is_difference(file: Path) -> bool:
    """Return whether a file begins as those of `pack` do. Raises OSError."""
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def unpack(
    file: Path,
    base: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
) -> dict[str, Tensor]:
    """Return the weights in a file of `pack`, as bfloat16, in the order of `shapes`.

    Raises ValueError if the file is truncated, too long, damaged, foreign, or made with other
    untouched weights; OSError if the file or `base` can't be read.
    """
    with file.open("rb") as stream:
        return read_from(stream, base, shapes)


def read_from(
    stream: BinaryIO,
    base: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
) -> dict[str, Tensor]:
    """Return the weights in a stream that can seek, as `unpack` does; raise as it does."""
    expected = _read_header(stream)
    digest = hashlib.sha256()
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    weights = {}
    try:
        with decompressor.stream_reader(stream, closefd=False) as packed:
            for name, shape in shapes.items():
                digest.update(_describe(name, shape))
                weights[name] = _read_tensor(packed, base[name], shape, digest)
            if packed.read(1):
                raise ValueError("too long: more values than the model has")
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged: {error}") from None
    if digest.digest() != expected:
        raise ValueError("damaged, or of a model with other shapes or untouched weights")
    return weights


def _read_header(stream: BinaryIO) -> bytes:
    """Return the digest in the header; leave the stream after it. Raises ValueError."""
    num_bytes = stream.seek(0, io.SEEK_END) - _HEADER.size
    stream.seek(0)
    header = stream.read(_HEADER.size)
    if not header.startswith(MAGIC):
        raise ValueError("not a difference of weights")
    if num_bytes < 0:
        raise ValueError("truncated: the header is incomplete")
    _, said, expected = _HEADER.unpack(header)
    if num_bytes != said:
        kind = "truncated" if num_bytes < said else "too long"
        raise ValueError(f"{kind}: {num_bytes} bytes follow the header; expected {said}")
    return bytes(expected)


def _read_tensor(
    packed: zstandard.ZstdDecompressionReader,
    untouched: Tensor,
    shape: torch.Size,
    digest: "hashlib._Hash",
) -> Tensor:
    if untouched.shape != shape:
        raise ValueError(f"shape {tuple(shape)}; the untouched model's is {tuple(untouched.shape)}")
    values = torch.empty(shape.numel(), dtype=torch.bfloat16)
    for piece, before in zip(_pieces_of(values), _pieces_of(untouched), strict=True):
        bits = _decode(_read_exactly(packed, 2 * len(piece)), _bits_of(before))
        digest.update(bits.data)
        piece.view(torch.int16).copy_(torch.from_numpy(bits.view(np.int16)))
    return values.reshape(shape)


def _read_exactly(
    packed: zstandard.ZstdDecompressionReader,
    num_bytes: int,
) -> bytes:
    content = bytearray()
    while len(content) < num_bytes:
        read = packed.read(num_bytes - len(content))
        if not read:
            raise ValueError("truncated: fewer values than the model has")
        content += read
    return bytes(content)


def _pieces_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield views of a tensor's values, at most PIECE_VALUES at once."""
    yield from torch.split(tensor.detach().reshape(-1), PIECE_VALUES)


def _bits_of(piece: Tensor) -> Bits:
    return piece.cpu().bfloat16().view(torch.int16).numpy().view(np.uint16)


def _encode(
    bits: Bits,
    before: Bits,
) -> bytes:
    """Return the differences of bits, made for compression.

    The order of numbers is 0, -1, 1, -2, 2 (zigzag), so that small ones have a high byte of 0. All
    low bytes come first, then all high bytes.
    """
    steps = (bits - before).view(np.int16)
    zigzag = (steps << 1) ^ (steps >> 15)
    return zigzag.view(np.uint8).reshape(-1, 2).T.tobytes()


def _decode(
    content: bytes,
    before: Bits,
) -> Bits:
    """Return the bits from which `_encode` made `content`."""
    low, high = np.frombuffer(content, dtype=np.uint8).reshape(2, -1).astype(np.uint16)
    zigzag = low | (high << 8)
    return before + ((zigzag >> 1) ^ -(zigzag & 1))


def _describe(name: str, shape: torch.Size) -> bytes:
    return json.dumps([name, list(shape)]).encode()
