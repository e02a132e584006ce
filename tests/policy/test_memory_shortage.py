"""Memory that other programs have taken: recognised, and waited for within limits."""

import pytest
import torch

from worker.policy import memory_shortage
from worker.policy.memory_shortage import PATIENCE_SECONDS, Shortage

GIB = 1 << 30


class Machine:
    """A clock, and memory that this process and others use. Time passes while one sleeps."""

    def __init__(self) -> None:
        self.now = 5000.0
        self.total, self.ours, self.others = 16 * GIB, 2 * GIB, 1 * GIB
        self.others_end_at = float("inf")

    def free(self, device: torch.device) -> int:
        others = self.others if self.now < self.others_end_at else 0
        return self.total - self.ours - others

    def used(self, device: torch.device) -> int:
        return self.ours

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(memory_shortage, "memory", machine)
    monkeypatch.setattr(memory_shortage, "time", machine)
    return machine


@pytest.fixture
def shortage(machine: Machine) -> Shortage:
    shortage = Shortage(torch.device("cpu"))
    shortage.look()
    return shortage


def test_memory_of_our_own_is_no_foreign_shortage(machine: Machine, shortage: Shortage) -> None:
    machine.ours = 15 * GIB
    assert not shortage.is_foreign()
    assert not shortage.wait()
    assert machine.now == 5000.0  # it did not wait


def test_small_differences_do_not_count(machine: Machine, shortage: Shortage) -> None:
    machine.others += GIB
    assert not shortage.is_foreign()
    machine.others += GIB
    assert shortage.is_foreign()


def test_memory_that_comes_back_is_waited_for(
    machine: Machine, shortage: Shortage, caplog: pytest.LogCaptureFixture
) -> None:
    machine.others, machine.others_end_at = 9 * GIB, machine.now + 3
    assert shortage.wait()
    assert 5003 <= machine.now < 5004
    assert "other programs have taken memory, waiting for it MiB=8192 seconds=15" in caplog.text


def test_wait_ends_when_there_is_enough_for_the_caller(
    machine: Machine, shortage: Shortage
) -> None:
    machine.others = 9 * GIB
    assert shortage.wait(lambda: machine.now > 5001)
    assert machine.now < 5002


def test_wait_without_success_is_not_repeated_for_ten_minutes(
    machine: Machine, shortage: Shortage
) -> None:
    machine.others = 9 * GIB
    assert not shortage.wait()
    assert machine.now == pytest.approx(5000 + PATIENCE_SECONDS, abs=0.5)
    began = machine.now
    assert not shortage.wait()
    assert machine.now == began
    machine.now += 600
    began = machine.now
    assert not shortage.wait()
    assert machine.now > began


def test_most_memory_that_was_ever_within_reach_is_the_measure(
    machine: Machine, shortage: Shortage
) -> None:
    machine.others = 0
    shortage.look()
    machine.others = 8 * GIB
    shortage.look()  # less than before: it does not lower the measure
    assert shortage.is_foreign()
