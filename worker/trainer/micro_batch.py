"""The number of tokens in one micro-batch on this machine: measured once, remembered, halved when
memory runs out.

A budget is the setting's limit halved a number of times, so that small differences in free memory
do not change how batches are cut, and with that the last digits of what is learnt.
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
"""Of the memory that is free: fragments, other processes, and batches that are not like the one
measured."""

_SAMPLE_SECONDS = 0.005

AFTER_ERROR_SECONDS = 600.0
AFTER_KILL_SECONDS = 7200.0
"""When more is tried again after memory ran out: an error costs a step made twice, a kill the whole
process. Each step back up takes as long; nine of them, from the least to the most that there is,
less than a day."""
_LONGEST_WAIT_SECONDS = 86400.0


@dataclass(frozen=True, slots=True)
class Budget:
    """`tokens` of one micro-batch; `recomputes`: layers are computed again in the backward pass, to
    save memory.

    In bytes, None where they were not measured: `held` by training at all (model, gradients,
    optimizer), and by the worst `step` on top of that.

    A budget that was lowered rises again, step by step, to what was measured: `full_tokens`,
    `full_recomputes`. `wait` are the seconds between two steps, the last of which was at `since`
    (seconds since 1970).
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
        """Halved until it is under `tokens`."""
        fewer = self.tokens
        while fewer >= tokens:
            fewer //= 2
        step = None if self.step is None else self.step * fewer // self.tokens
        return replace(self, tokens=fewer, step=step)

    def recomputing(self) -> "Budget":
        return replace(self, recomputes=True, step=None)

    def as_measured(self) -> "Budget":
        """This budget as the one that it rises to after it was lowered."""
        return replace(self, full_tokens=self.tokens, full_recomputes=self.recomputes)

    def rising_after(self, wait: float) -> "Budget":
        """This budget, lowered just now, to rise after `wait` seconds; twice as long if the last
        rise was in vain."""
        again = 2 * self.wait if time.time() - self.since < self.wait else 0.0
        return replace(self, wait=min(_LONGEST_WAIT_SECONDS, max(wait, again)), since=time.time())

    def risen(self) -> "Budget":
        """A step more, if it is time for one; else the same."""
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
    """Bytes that a step needed next to the gradients, those that steps may take, and those that
    were held before."""

    needed: int
    available: int
    held: int = 0


def measure(step: Callable[[], object], device: torch.device) -> Measured | None:
    """Run `step` twice, for the second time with gradients in place, and see what that takes. None:
    out of memory."""
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


def describe(policy: Policy, trainer: settings.Trainer, generation: settings.Generation) -> str:
    """Return what a budget was measured for: with anything of this changed it does not hold any
    more."""
    machine = memory.describe(policy.model.device)
    adapters = trainer.lora_for(policy.model.num_parameters())
    lora = None if adapters is None else adapters.model_dump_json()
    lengths = f"{generation.max_prompt_length}+{generation.max_completion_length}"
    return (
        f"{policy.name} {policy.model.dtype} on {machine}, {lengths} tokens, at most"
        f" {trainer.max_tokens_per_micro_batch}, beta {trainer.beta}, lora {lora}, beside"
        f" {generation.engine} {generation.vllm_memory:g}"
    )


def load(file: Path, key: str) -> Budget | None:
    """The budget that `file` holds; None if there is none, if it is for something else, or damaged
    (warned of)."""
    return _budget(file, memory.recall(file, key))


def recall(file: Path, start_of_key: str) -> Budget | None:
    """The same for a caller that does not know the whole key: whatever was measured last for what
    begins so."""
    try:
        record = json.loads(file.read_text())
        key = str(record["key"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return _budget(file, record) if key.startswith(start_of_key) else None


def _budget(file: Path, record: dict[str, Any] | None) -> Budget | None:
    if record is None:
        return None
    tokens, recomputes = record.get("tokens"), record.get("recomputes")
    if type(tokens) is not int or tokens < 1 or type(recomputes) is not bool:
        log.warning("token budget is damaged, it is measured again path=%s", file)
        return None
    held, step = (
        value if type(value := record.get(name)) is int else None for name in ("held", "step")
    )
    return Budget(tokens, recomputes, held, step, **_way_up(record))


def _way_up(record: dict[str, Any]) -> dict[str, Any]:
    """Return how a lowered budget rises. Files of versions before this have nothing of it: their
    budget stays as it is."""
    full, recomputes = record.get("full_tokens"), record.get("full_recomputes")
    wait, since = record.get("wait"), record.get("since")
    if type(full) is not int or type(recomputes) is not bool:
        return {}
    if not isinstance(wait, float) or not isinstance(since, float):
        return {}
    # A clock that was set back must not keep it low.
    since = min(since, time.time())
    return {"full_tokens": full, "full_recomputes": recomputes, "wait": wait, "since": since}


def save(file: Path, key: str, budget: Budget) -> None:
    """Remember `budget`, atomically. Raises ResourceError if the disk does not take it."""
    memory.remember(file, key, asdict(budget))


class _Peak:
    """The most memory in use while inside, in `bytes`. On a CPU it is looked up every few
    milliseconds."""

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
