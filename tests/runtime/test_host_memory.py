"""Pressure on memory: from recordings (recordings/, with sources), and of this machine."""

from pathlib import Path

import pytest

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
