"""A decoding step on a GPU, recorded once and replayed: hundreds of small operations are launched
as one CUDA graph.

One by one a GPU waits for Python between them, most of the time. What is recorded works on the same
memory each time, so its tensors must keep their places and their shapes, and nothing of it may
depend on a number that Python computes.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from worker.policy import memory

log = logging.getLogger(__name__)

Work = Callable[[], Tensor]


class Replay:
    """Does the same work again and again: plainly the first time, when libraries load what they
    need, then replayed.

    The tensor that it returns is overwritten by the next call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._num_done = 0
        self._recorded: Work | None = None

    def __call__(self, work: Work) -> Tensor:
        self._num_done += 1
        if self._num_done == 2:
            self._recorded = self._record(work)
        return work() if self._recorded is None else self._recorded()

    def _record(self, work: Work) -> Work | None:
        try:
            return record(work, self._device)
        except RuntimeError as error:
            if memory.is_out_of_memory(error):
                raise
            _say_once(memory.reason_of(error))
            return None


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("steps are not replayed reason=%s; generation is slower", reason)


def record(work: Work, device: torch.device) -> Work:
    """Return what `work` launches on the GPU, as one graph. Nothing is computed before the result
    is called."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    # Other threads of the worker may use the GPU meanwhile.
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        out = work()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
