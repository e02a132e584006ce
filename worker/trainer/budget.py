"""How many tokens go into one micro-batch on this machine: measured once, remembered, halved when memory runs out.

A budget is the setting's limit halved a number of times, so that small differences in free memory do not change how
batches are cut, and with that the last digits of what is learnt.
"""

import json
import logging
import os
import resource
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from worker import settings
from worker.errors import ResourceError
from worker.policy.policy import Policy

log = logging.getLogger(__name__)

_SHARE = 0.7
"""Of the memory that is free: fragments, other processes, and batches that are not like the one measured."""

_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Budget:
    """`tokens` of one micro-batch; `recomputes`: layers are computed again in the backward pass, to save memory."""

    tokens: int
    recomputes: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes that a step needed beside the gradients, and those that steps may take."""

    needed: int
    available: int


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an error of its own; on a CPU torch's allocator and Python's say it in their ways."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def measure(step: Callable[[], object], device: torch.device) -> Measured | None:
    """Run `step` twice, for the second time with gradients in place, and see what that takes. None: out of memory."""
    try:
        step()
        before = _used(device)
        with _Peak(device) as peak:
            step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return Measured(max(0, peak.bytes - before), int(_SHARE * _free(device)))


def release(device: torch.device) -> None:
    """Give memory that torch keeps for later back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(policy: Policy, trainer: settings.Trainer, generation: settings.Generation) -> str:
    """What a budget was measured for: with anything of this changed it does not hold any more."""
    device = policy.model.device
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_properties(device).total_memory}"
    else:
        machine = f"cpu {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')}"
    lora = None if trainer.lora is None else trainer.lora.model_dump_json()
    lengths = f"{generation.max_prompt_length}+{generation.max_completion_length}"
    return (
        f"{policy.name} {policy.model.dtype} on {machine}, {lengths} tokens, at most "
        f"{trainer.max_tokens_per_micro_batch}, beta {trainer.beta}, lora {lora}"
    )


def load(file: Path, key: str) -> Budget | None:
    """The budget that `file` holds; None if there is none, if it is for something else, or damaged (warned of)."""
    try:
        record = json.loads(file.read_text())
        if record["key"] != key:
            return None
        tokens, recomputes = record["tokens"], record["recomputes"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("token budget can't be read, measured again path=%s error=%r", file, error)
        return None
    if type(tokens) is not int or tokens < 1 or type(recomputes) is not bool:
        log.warning("token budget is damaged, measured again path=%s", file)
        return None
    return Budget(tokens, recomputes)


def save(file: Path, key: str, budget: Budget) -> None:
    """Remember `budget`, atomically. Raises ResourceError if the disk does not take it."""
    unfinished = file.with_name(f".unfinished-{file.name}")
    try:
        unfinished.write_text(json.dumps({"key": key, **asdict(budget)}, indent=1) + "\n")
        os.replace(unfinished, file)
    except OSError as error:
        raise ResourceError(f"{file}: can't be written: {error.strerror}; free space on that disk") from error


class _Peak:
    """The most memory in use while inside, in `bytes`. On a CPU it is looked up every few milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="memory-peak", daemon=True)

    def __enter__(self) -> "_Peak":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self._done.set()
            self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self.bytes = max(self.bytes, _used(self._device))


def _used(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _pages(1)


def _free(device: torch.device) -> int:
    """Bytes that may still be taken: of the GPU, or of this machine's memory within this process's own limits."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    limits = [_available()]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space - _pages(0))
    limits.extend(_control_groups())
    return max(0, min(limits))


def _pages(field: int) -> int:
    """Bytes of /proc/self/statm: 0 the whole address space, 1 what is in memory."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _control_groups() -> list[int]:
    """What the limits of systemd or a container leave (cgroup v2), for this process's group and those above it."""
    left = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if not line.startswith("0::"):
            continue
        folder = Path("/sys/fs/cgroup") / line.removeprefix("0::").strip("/")
        for group in (folder, *folder.parents):
            limit, current = group / "memory.max", group / "memory.current"
            if limit.is_file() and current.is_file() and (text := limit.read_text().strip()) != "max":
                left.append(int(text) - int(current.read_text()))
    return left
