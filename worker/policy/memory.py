"""Measure free and used memory, recognise out-of-memory errors, and store measured limits.

Limits of this machine are in small files of the state folder, each with a key that describes the
circumstances in which it is valid.
"""

import ctypes
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
    # by the driver: no memory for a kernel, a stream or a context (torch.AcceleratorError)
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",  # of cuDNN 9
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out.

    torch has a class for errors of its allocators; errors of other allocations are recognised by
    their messages.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def release(device: torch.device) -> None:
    """Give memory that is kept for reuse back to the device; on a CPU, to the system.

    glibc keeps the freed memory of tensors of many sizes: after some steps of a model with 135
    million parameters that is 3 GB, half of the process.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def used(device: torch.device) -> int:
    """Return the bytes in use: by torch on a GPU, by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _pages(1)


def free(device: torch.device) -> int:
    """Return the free bytes of the GPU, or of the RAM within this process's own limits."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    limits = [_available(), *_left_of_own_control_groups()]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space - _pages(0))
    return max(0, min(limits))


def describe(device: torch.device) -> str:
    """Describe the machine's memory, for the keys of stored limits."""
    if device.type == "cuda":
        return (
            f"{torch.cuda.get_device_name(device)}"
            f" {torch.cuda.get_device_properties(device).total_memory}"
        )
    return f"cpu {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')}"


def recall(
    file: Path,
    key: str,
) -> dict[str, Any] | None:
    """Return the values in `file`; None if it is missing, has another key, or is damaged.

    A damaged file is logged.
    """
    try:
        record = json.loads(file.read_text())
        return dict(record) if record["key"] == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning(
            "ignoring a corrupt memory limit, measuring it again path=%s error=%r",
            file,
            error,
        )
        return None


def remember(
    file: Path,
    key: str,
    values: dict[str, Any],
) -> None:
    """Write `values` to `file`; raise ResourceError if the disk is full or fails."""
    write_whole(file, json.dumps({"key": key, **values}, indent=1) + "\n")


def left_in(group: Path) -> list[int]:
    """Return the free bytes of those that have a limit: a control group (v2) and its ancestors."""
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
    """Return a field of /proc/self/statm in bytes: 0 the address space, 1 the resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
