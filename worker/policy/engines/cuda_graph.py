"""Record a decoding step on a GPU once and replay it as one CUDA graph.

A step is hundreds of small operations. If Python launches them one by one, the GPU mostly waits for
it. A graph uses the same memory each time, so its tensors must keep their addresses and shapes, and
no operation may depend on a number that Python computes.
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
    """Runs the same work repeatedly: from the second call on, a recorded graph.

    The first call is not recorded, because libraries load their kernels then. The returned tensor
    is overwritten by the next call.
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
            _warn_once(memory.reason_of(error))
            return None


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("CUDA graphs not used reason=%s; generation is slower", reason)


def record(work: Work, device: torch.device) -> Work:
    """Return a function that replays what `work` launches on the GPU as one graph."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    # Thread-local, because other threads of the worker may use the GPU meanwhile.
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        out = work()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
