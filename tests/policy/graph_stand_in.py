"""A stand-in for CUDA graphs on a CPU: the operations of a piece of work, done again later on the
same tensors.

As of a CUDA graph, nothing of the work's Python is run again: an operation that was given a number
still has it, and one that was given a tensor reads what is in its memory by then. Results are
written where they were the first time.
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
            # Views are views of the same memory again, and so is what is changed in its place.
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
