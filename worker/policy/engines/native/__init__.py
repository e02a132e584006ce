"""The operations of a decoding step in C, compiled for this machine when a model is loaded.

The sources are native.c, step.c and products_*.c. Without a C compiler, or on a GPU, decoder.py
computes the same in torch.
"""

import contextlib
import ctypes
import functools
import logging
import mmap
import os
import shutil
import subprocess
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from worker.errors import ModelError
from worker.policy.engines.native.compilation import compile_library

log = logging.getLogger(__name__)

_LINE = 64  # bytes of a cache line
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "add_norm": [_POINTER] * 4 + [_INT] * 2 + [_FLOAT],
    "turn_heads": [_POINTER] * 5 + [_INT] * 6 + [_FLOAT] * 2,
    "attend": [_POINTER] * 9 + [_INT] * 8 + [_FLOAT],
    "draw": [_POINTER] * 5 + [_INT] * 2 + [_FLOAT] * 2,
    "gate": [_POINTER] * 2 + [_INT] * 3,
    "panel_bytes": [_INT] * 2,
    "block_bytes": [_INT] * 2,
    "pack": [_POINTER] * 2 + [_INT] * 2,
    "multiply": [_POINTER] * 5 + [_INT] * 3,
    "ask_for_tiles": [],
    "run_step": [_POINTER],
}
_COUNTS = ("panel_bytes", "block_bytes", "ask_for_tiles")
"""The C functions that return an integer; the others return nothing."""
QUERIES = 4
"""Largest number of queries that attention computes at once; it sets the size of `scores`."""


def is_gelu(activation: Any) -> bool:
    return isinstance(activation, GELUTanh)


def knows(activation: Any) -> bool:
    return isinstance(activation, (nn.SiLU, SiLUActivation, GELUTanh))


_CHUNK = 32 << 20
"""Bytes to map at once; small weights share such a chunk."""
_chunk: list[tuple[mmap.mmap, int]] = []
"""The chunk with room left, and the number of its bytes in use; empty at first."""


def _take_room(size: int) -> Tensor:
    """Return `size` bytes, aligned to a cache line, in huge pages if the kernel has them.

    A step reads all weights once; with pages of 4 KiB that takes a sixth longer.
    """
    size = -(-size // _LINE) * _LINE
    if size >= _CHUNK:
        return torch.frombuffer(_map_memory(size), dtype=torch.uint8)
    chunk, taken = _chunk.pop() if _chunk else (_map_memory(_CHUNK), 0)
    if taken + size > _CHUNK:
        chunk, taken = _map_memory(_CHUNK), 0
    _chunk.append((chunk, taken + size))
    return torch.frombuffer(chunk, dtype=torch.uint8, offset=taken, count=size)


def _map_memory(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Panels:
    """A 16-bit weight (N, M) in the layout for `x @ weight.T + bias` with float32 rows x."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        functions: Any,
    ) -> None:
        self._functions = functions
        self.num_outputs, self.num_inputs = weight.shape
        self._panels = _take_room(functions.panel_bytes(*weight.shape))
        self.fill(weight, bias)

    def fill(
        self,
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        """Replace weight and bias by others of the same shapes."""
        self._bias = None if bias is None else bias.float().contiguous()
        rows = weight.float().contiguous()
        self._functions.pack(
            rows.data_ptr(), self._panels.data_ptr(), self.num_outputs, self.num_inputs
        )

    def fields(self) -> tuple[int, int | None, int, int]:
        """Return the fields of `struct product` in step.c; they point into this object."""
        bias = None if self._bias is None else self._bias.data_ptr()
        return self._panels.data_ptr(), bias, self.num_outputs, self.num_inputs

    def block_bytes(self, num_rows: int) -> int:
        """Return the bytes of the buffer that `multiply` needs for that many rows."""
        return int(self._functions.block_bytes(num_rows, self.num_inputs))

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        blocks = torch.empty(self._functions.block_bytes(*x.shape), dtype=torch.uint8)
        out = x.new_empty((len(x), self.num_outputs))
        self._functions.multiply(
            x.data_ptr(),
            self._panels.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            blocks.data_ptr(),
            out.data_ptr(),
            *(len(x), self.num_outputs, self.num_inputs),
        )
        return out


WAYS = ("amx", "int16", "float16", "bfloat16")
"""The formats of products_*.c. HIVEWRIGHT_NATIVE names one, or `none` for torch's operations."""


def load(*flags: str) -> Any | None:
    """Return the C functions, compiled with additional `flags`.

    None if they can't be compiled, which is logged. Raises ModelError if HIVEWRIGHT_NATIVE names a
    format that this machine can't compute.
    """
    way = wanted()
    return None if way == "none" else _load(way, *flags)


def wanted() -> str | None:
    """Return the format in HIVEWRIGHT_NATIVE; None: the fastest of this machine."""
    way = os.environ.get("HIVEWRIGHT_NATIVE", "")
    if way in ("", "auto"):
        return None
    if way not in (*WAYS, "none"):
        raise ModelError(
            f"HIVEWRIGHT_NATIVE: got {way!r}; expected {', '.join(WAYS)}, none or auto"
        )
    return way


_reasons: list[str] = []


def why_not() -> str:
    """Return the reason why `load` returned None."""
    return _reasons[-1] if _reasons else "not tried"


@functools.cache
def _load(way: str | None, *flags: str) -> Any | None:
    try:
        if way:
            return _link(*flags, f"-DWANTED_{way.upper()}")
        return _link_with_allowed(*flags)
    except _NotCompiledError as error:
        if way:
            raise ModelError(
                f"HIVEWRIGHT_NATIVE: {way} is not available here: {error}; expected another of"
                f" {', '.join(WAYS)}, none or auto"
            ) from None
        _reasons.append(str(error))
        log.log(error.level, "native operations not used reason=%s; generation is slower", error)
        return None


class _NotCompiledError(Exception):
    """The library can't be compiled; `level` is that of the log line."""

    def __init__(self, reason: str, level: int) -> None:
        super().__init__(reason)
        self.level = level


class _TilesRefusedError(_NotCompiledError):
    """The processor has AMX, but the kernel does not let this process use it."""


def _link_with_allowed(*flags: str) -> Any:
    try:
        return _link(*flags)
    except _TilesRefusedError as error:
        log.log(error.level, "AMX not used reason=%s; generation is slower", error)
        return _link(*flags, "-mno-amx-tile")


def _link(*flags: str) -> Any:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise _NotCompiledError("no C compiler (cc)", logging.INFO)
    try:
        library = compile_library(compiler, flags)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in lines if "#error" in line), lines[0])
        raise _NotCompiledError(
            f"{compiler} says {reason.rpartition('#error ')[2]}", logging.WARNING
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _NotCompiledError(str(error), logging.WARNING) from None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _INT if name in _COUNTS else None
    if refused := library.ask_for_tiles():
        raise _TilesRefusedError(
            f"the kernel refuses AMX's tiles: {os.strerror(refused)}", logging.WARNING
        )
    return library
