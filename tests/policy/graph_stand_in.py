"""A stand-in for CUDA graphs on a CPU: it records operations and repeats them on the same tensors.

As with a CUDA graph, no Python of the work runs again: an operation with a number keeps it, and one
with a tensor reads the memory as it is then. Results are written to the same memory as the first
time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            # Views, and results of in-place operations, share the memory again.
            is_new = not any(r.alias_info for r in function._schema.returns)
            for place, result in zip(tensors(out), tensors(again), strict=True):
                if is_new:
                    place.copy_(result)


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


def record(work: Any, device: torch.device) -> Any:
    recording = Recording()
    with recording:
        out = work()

    def replay() -> Tensor:
        recording.replay()
        return out

    return replay
