"""Read how scarce this machine's memory is, from /proc/meminfo and /proc/pressure.

Health checks, the doctor and the fleet's status use the limits here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
LOW_MB, TOO_LOW_MB = 1000, 250
"""Limits of the available memory, in 10^6 bytes: less is a warning, or severe."""
STALLED, STALLED_BADLY = 0.1, 0.5
"""Limits of the share of the last minute in which programs waited: warning, and severe."""
MORE_ROOM = "end other programs there, run fewer slots, or add memory"
LESS_USE = (
    "end other programs there, lower slot_memory_gb of the largest worker or run fewer slots, or"
    " add memory"
)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory in 10^6 bytes; `available_mb`: the kernel's estimate of what programs can still take.

    `stalled`: share of the last minute in which at least one program waited for memory. None: the
    kernel does not report it (before 4.20, or booted with psi=0).
    """

    available_mb: int | None = None
    total_mb: int | None = None
    stalled: float | None = None


def read(proc: Path = PROC) -> HostMemory:
    """Return the state of this machine's memory now."""
    return parse(_text(proc / "meminfo"), _text(proc / "pressure/memory"))


def parse(meminfo: str, pressure: str) -> HostMemory:
    """Return the state in the contents of /proc/meminfo and /proc/pressure/memory."""
    kib = dict(re.findall(r"^(\w+): +(\d+) kB$", meminfo, re.MULTILINE))
    available, total = kib.get("MemAvailable"), kib.get("MemTotal")
    waited = re.search(r"^some .*\bavg60=(\d+(?:\.\d+)?)", pressure, re.MULTILINE)
    return HostMemory(
        None if available is None else int(available) * 1024 // 10**6,
        None if total is None else int(total) * 1024 // 10**6,
        None if waited is None else float(waited[1]) / 100,
    )


def problems(memory: HostMemory) -> Iterator[str]:
    """Yield a line for each problem: cause, and what to do."""
    if memory.available_mb is not None and memory.available_mb < LOW_MB:
        yield f"ram: {memory.available_mb} of {memory.total_mb} MB are available; {MORE_ROOM}"
    if memory.stalled is not None and memory.stalled > STALLED:
        yield f"pressure: {show_stalled(memory.stalled)}; {LESS_USE}"


def show_stalled(share: float | None) -> str:
    """Return the share of the last minute in which programs waited, for people."""
    if share is None:
        return "not known: the kernel has no /proc/pressure/memory"
    return f"programs waited for memory in {share:.0%} of the last minute"


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""  # pressure stall information is off, or this is not Linux
