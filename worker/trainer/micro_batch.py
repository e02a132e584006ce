"""Find and store the token budget: the number of tokens of one micro-batch on this machine.

It is measured once, stored, and halved when memory runs out. A budget is the setting's limit halved
a number of times, so that small differences in free memory do not change how batches are split, and
with it the rounding of gradients.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from worker import settings
from worker.policy import memory
from worker.policy.policy import Policy

log = logging.getLogger(__name__)

_SHARE = 0.7
"""Share of the free memory to use.

The rest is for fragmentation, other processes, and batches that differ from the measured one.
"""

_SAMPLE_SECONDS = 0.005

AFTER_ERROR_SECONDS = 600.0
AFTER_KILL_SECONDS = 7200.0
"""Time before a lowered budget is raised by one step, after an error or after a kill.

A failed attempt costs a repeated step after an error, and the whole process after a kill. The nine
steps from the smallest to the largest budget take less than a day.
"""
_LONGEST_WAIT_SECONDS = 86400.0


@dataclass(frozen=True, slots=True)
class Budget:
    """The number of `tokens` of one micro-batch, and its use of memory.

    `recomputes`: layers are computed again in the backward pass, to save memory. `held` are the
    bytes of model, gradients and optimizer, `step` those that the largest step needs in addition;
    None: not measured.

    A lowered budget is raised again, step by step, to the measured one: `full_tokens` (None: the
    budget does not rise) and `full_recomputes`. `wait` is the time between two steps in seconds,
    `since` the time of the last change in seconds since 1970.
    """

    tokens: int
    recomputes: bool = False
    held: int | None = field(default=None, compare=False)
    step: int | None = field(default=None, compare=False)
    full_tokens: int | None = field(default=None, compare=False)
    full_recomputes: bool = field(default=False, compare=False)
    wait: float = field(default=0.0, compare=False)
    since: float = field(default=0.0, compare=False)

    def below(self, tokens: int) -> "Budget":
        """Return the budget halved until it is less than `tokens`."""
        fewer = self.tokens
        while fewer >= tokens:
            fewer //= 2
        step = None if self.step is None else self.step * fewer // self.tokens
        return replace(self, tokens=fewer, step=step)

    def recomputing(self) -> "Budget":
        return replace(self, recomputes=True, step=None)

    def as_measured(self) -> "Budget":
        """Return the budget with itself as the one to which it rises after it was lowered."""
        return replace(self, full_tokens=self.tokens, full_recomputes=self.recomputes)

    def rising_after(self, wait: float) -> "Budget":
        """Return this budget, just lowered, with the time of its next rise in `wait` seconds.

        If the last change was less than the previous `wait` ago, the new one is at least twice as
        long, up to a day.
        """
        again = 2 * self.wait if time.time() - self.since < self.wait else 0.0
        return replace(self, wait=min(_LONGEST_WAIT_SECONDS, max(wait, again)), since=time.time())

    def risen(self) -> "Budget":
        """Return the budget raised by one step if its time has come, or unchanged.

        A step turns `recomputes` off, or doubles the tokens.
        """
        full = self.tokens if self.full_tokens is None else self.full_tokens
        is_full = self.tokens >= full and self.recomputes == self.full_recomputes
        if is_full or time.time() - self.since < self.wait:
            return self
        if self.recomputes and not self.full_recomputes:
            return replace(self, recomputes=False, since=time.time())
        step = None if self.step is None else self.step * min(full, 2 * self.tokens) // self.tokens
        return replace(self, tokens=min(full, 2 * self.tokens), step=step, since=time.time())


@dataclass(frozen=True, slots=True)
class Measured:
    """The memory of a step, in bytes.

    `needed` is the use of the step in addition to model and gradients, `available` the memory that
    a step may use, `held` the use before the step.
    """

    needed: int
    available: int
    held: int = 0


def measure(
    step: Callable[[], object],
    device: torch.device,
) -> Measured | None:
    """Run `step` twice and measure the memory of the second run, when gradients are allocated.

    None: out of memory. Other errors of `step` are raised.
    """
    try:
        step()
        before = memory.used(device)
        with _Peak(device) as peak:
            step()
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        return None
    return Measured(max(0, peak.bytes - before), int(_SHARE * memory.free(device)), before)


def describe(
    policy: Policy,
    trainer: settings.Trainer,
    generation: settings.Generation,
) -> str:
    """Return the key of a stored budget: everything that affects the memory that training needs.

    A budget with another key is invalid.
    """
    machine = memory.describe(policy.model.device)
    adapters = trainer.lora_for(policy.model.num_parameters())
    lora = None if adapters is None else adapters.model_dump_json()
    lengths = f"{generation.max_prompt_length}+{generation.max_completion_length}"
    return (
        f"{policy.name} {policy.model.dtype} on {machine}, {lengths} tokens, at most"
        f" {trainer.max_tokens_per_micro_batch}, beta {trainer.beta}, lora {lora}, next to"
        f" {generation.engine} {generation.vllm_memory:g}"
    )


def load(file: Path, key: str) -> Budget | None:
    """Return the budget in `file`.

    None if the file does not exist, has another key, or is damaged, which is logged.
    """
    return _budget(file, memory.recall(file, key))


def recall(file: Path, start_of_key: str) -> Budget | None:
    """Return the budget in `file` if its key starts with `start_of_key`.

    For a caller that does not know the whole key. None as for `load`.
    """
    try:
        record = json.loads(file.read_text())
        key = str(record["key"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return _budget(file, record) if key.startswith(start_of_key) else None


def _budget(
    file: Path,
    record: dict[str, Any] | None,
) -> Budget | None:
    if record is None:
        return None
    tokens, recomputes = record.get("tokens"), record.get("recomputes")
    if type(tokens) is not int or tokens < 1 or type(recomputes) is not bool:
        log.warning("ignoring a corrupt token budget, measuring it again path=%s", file)
        return None
    held, step = (
        value if type(value := record.get(name)) is int else None for name in ("held", "step")
    )
    return Budget(tokens, recomputes, held, step, **_way_up(record))


def _way_up(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a budget that determine how it is raised again.

    Empty if they are missing, as in files of older versions: that budget does not rise.
    """
    full, recomputes = record.get("full_tokens"), record.get("full_recomputes")
    wait, since = record.get("wait"), record.get("since")
    if type(full) is not int or type(recomputes) is not bool:
        return {}
    if not isinstance(wait, float) or not isinstance(since, float):
        return {}
    # A time in the future (the clock was set back) must not keep the budget low.
    since = min(since, time.time())
    return {"full_tokens": full, "full_recomputes": recomputes, "wait": wait, "since": since}


def save(
    file: Path,
    key: str,
    budget: Budget,
) -> None:
    """Write `budget` to `file` atomically; raise ResourceError if the disk is full or fails."""
    memory.remember(file, key, asdict(budget))


class _Peak:
    """Context manager that measures the peak of memory in use, as `bytes`.

    On a CPU the memory is sampled every _SAMPLE_SECONDS by a thread.
    """

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
            self.bytes = max(self.bytes, memory.used(self._device))
