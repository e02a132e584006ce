"""Memory: what may still be taken, what is in use, when an error says that there is none, and what
was learnt of it.

What was learnt on this machine is in small files of the state folder, each with a key that says
what it holds for.
"""

import json
import logging
import os
import resource
from pathlib import Path
from typing import Any

import torch

from worker.runtime.files import write_whole

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = (
    "can't allocate memory",  # torch's allocator on a CPU
    # the driver's: a kernel, a stream, a context (torch.AcceleratorError)
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",  # what cuDNN 9 says in its place
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """torch has an error of its own for its allocators; what else takes memory says it in its own
    words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def reason_of(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def release(device: torch.device) -> None:
    """Give memory that torch keeps for later back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def used(device: torch.device) -> int:
    """Bytes in use: by torch on a GPU, by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _pages(1)


def free(device: torch.device) -> int:
    """Bytes that may still be taken: of the GPU, or of this machine's memory within this process's
    own limits."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    limits = [_available(), *_left_of_own_control_groups()]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space - _pages(0))
    return max(0, min(limits))


def describe(device: torch.device) -> str:
    """The machine as far as its memory goes, for keys."""
    if device.type == "cuda":
        return (
            f"{torch.cuda.get_device_name(device)}"
            f" {torch.cuda.get_device_properties(device).total_memory}"
        )
    return f"cpu {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')}"


def recall(file: Path, key: str) -> dict[str, Any] | None:
    """Return what `file` remembers; None if there is none, if it is for something else, or damaged
    (warned of)."""
    try:
        record = json.loads(file.read_text())
        return dict(record) if record["key"] == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning(
            "what was learnt of memory can't be read, it is measured again path=%s error=%r",
            file,
            error,
        )
        return None


def remember(file: Path, key: str, values: dict[str, Any]) -> None:
    """Write `values` down. Raises ResourceError if the disk does not take it."""
    write_whole(file, json.dumps({"key": key, **values}, indent=1) + "\n")


def left_in(group: Path) -> list[int]:
    """Return what a control group (v2) and those above it still allow, where they have a limit."""
    left = []
    for folder in (group, *group.parents):
        limit, current = folder / "memory.max", folder / "memory.current"
        if limit.is_file() and current.is_file() and (text := limit.read_text().strip()) != "max":
            left.append(max(0, int(text) - int(current.read_text())))
    return left


def _left_of_own_control_groups() -> list[int]:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    groups = [line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")]
    return [left for group in groups for left in left_in(Path("/sys/fs/cgroup") / group)]


def _pages(field: int) -> int:
    """Bytes of /proc/self/statm: 0 the whole address space, 1 what is in memory."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
