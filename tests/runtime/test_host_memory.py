"""Pressure on memory: from recordings (recordings/, with sources), and of this machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lab.process import wait_until
from tests.runtime.test_gpu_health import recording
from worker.runtime import host_memory
from worker.runtime.host_memory import HostMemory, parse, problems, read

IDLE = "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00"


def test_figures_of_recordings():
    memory = parse(recording("meminfo.txt"), recording("pressure-memory.txt"))
    assert (memory.available_mb, memory.total_mb) == (15679, 25276)
    assert memory.stalled == pytest.approx(0.5868)
    (line,) = problems(memory)
    assert line.startswith("pressure: programs waited for memory in 59% of the last minute; end")


def test_this_machine_is_read_and_its_figures_make_sense():
    memory = read()
    assert memory.total_mb is not None
    assert memory.available_mb is not None
    assert 0 < memory.available_mb < memory.total_mb
    has_pressure = Path("/proc/pressure/memory").exists()
    assert (memory.stalled is not None) == has_pressure
    assert 0 <= (memory.stalled or 0) <= 1


@pytest.mark.parametrize(
    ("available", "stalled", "checks"),
    [
        (host_memory.LOW_MB, host_memory.STALLED, []),
        (host_memory.LOW_MB - 1, 0.0, ["ram"]),
        (host_memory.LOW_MB - 1, host_memory.STALLED + 0.01, ["ram", "pressure"]),
        (None, None, []),
    ],
)
def test_each_problem_is_named_with_what_to_do(available, stalled, checks):
    found = list(problems(HostMemory(available, 64_000, stalled)))
    assert [line.partition(":")[0] for line in found] == checks
    assert all("; end other programs there" in line for line in found)


def test_kernel_that_reports_no_pressure_is_not_one_without_pressure(tmp_path):
    (tmp_path / "meminfo").write_text(recording("meminfo.txt"))
    memory = read(tmp_path)
    assert (memory.available_mb, memory.stalled) == (15679, None)
    assert "no /proc/pressure/memory" in host_memory.show_stalled(memory.stalled)
    assert parse("", IDLE) == HostMemory(None, None, 0.0)
    assert parse("MemAvailable: lots kB", "some avg60=?") == HostMemory()


GROUPS = Path("/sys/fs/cgroup")
LIMIT_BYTES, FILE_BYTES = 48 << 20, 160 << 20
READER = """
import mmap, os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
file = os.open(sys.argv[2], os.O_RDONLY)
pages = mmap.mmap(file, 0, prot=mmap.PROT_READ)
total = 0
while True:
    for place in range(0, len(pages), 4096):
        total += pages[place]
"""


@contextmanager
def limited_group() -> Iterator[Path]:
    """Make a control group with LIMIT_BYTES of memory, of whichever version there is."""
    top, name = GROUPS / "memory", "memory.limit_in_bytes"
    if not top.exists():
        top, name = GROUPS, "memory.max"
    group = top / f"hivewright-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(LIMIT_BYTES))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group with a memory limit can be made here: {error}")
    try:
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), 20, "the group is empty")
        group.rmdir()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_real_pressure_is_read_as_a_share_and_named(tmp_path, monkeypatch):
    """Programs read a file that is larger than their memory again and again.

    It ends well below STALLED, so that others on this machine are not warned of it.
    """
    monkeypatch.setattr(host_memory, "STALLED", 0.01)
    before = host_memory.read().stalled
    if before is None:
        pytest.skip("this kernel has no /proc/pressure/memory")
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20) * (FILE_BYTES >> 20))
    with file.open("rb") as stream:  # its pages are to be those of the group
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with limited_group() as group, ExitStack() as stack:
        command = [sys.executable, "-c", READER, group / "cgroup.procs", file]
        for _ in range(2):
            reader = stack.enter_context(subprocess.Popen(command))
            stack.callback(reader.kill)
        wait_until(lambda: (host_memory.read().stalled or 0) > before + 0.02, 120, "it rises", 0.2)
        (problem,) = [
            line
            for line in host_memory.problems(host_memory.read())
            if line.startswith("pressure: ")
        ]
    assert "programs waited for memory in " in problem
    assert "lower slot_memory_gb" in problem
