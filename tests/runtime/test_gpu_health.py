"""Health of GPUs, from recordings of nvidia-smi and of kernel logs (recordings/, with sources)."""

from pathlib import Path

import pytest

from worker.runtime import gpu_health
from worker.runtime.gpu_health import parse, xid_problems

RECORDINGS = Path(__file__).parent / "recordings"
LOST = "Unable to determine the device handle for GPU3: 0000:5E:00.0: Unknown Error"


def recording(name):
    lines = (RECORDINGS / name).read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def changed(line, value):
    """Return the recording with the value of its first such line changed."""
    text = recording("rtx4090-smi-q.txt")
    before, found, rest = text.partition(f" {line} ")
    assert found, line
    old, _, after = rest.partition("\n")
    return f"{before}{found}{old.partition(':')[0]}: {value}\n{after}"


def test_figures_of_a_recording():
    idle, busy = parse(recording("rtx4090-smi-q.txt"))
    assert (idle.bus_id, busy.bus_id) == ("00000000:01:00.0", "00000000:23:00.0")
    assert idle.uuid == "GPU-370465f5-30e0-6877-b85c-16729f41b90f"
    assert (busy.name, busy.temperature, busy.power) == ("NVIDIA GeForce RTX 4090", 72, 445.38)
    assert (idle.clock, idle.max_clock) == (210, 3105)
    assert (busy.power_limit, busy.pcie_width, busy.pcie_max_width) == (450, 16, 16)
    assert idle.ecc_uncorrected is None
    assert (idle.problems, busy.problems) == ((), ())


@pytest.mark.parametrize(
    ("line", "value", "text", "action", "is_ill"),
    [
        ("HW Thermal Slowdown", "Active", "throttled: HW Thermal", "cool it", False),
        ("SW Thermal Slowdown", "Active", "throttled: SW Thermal", "cool it", False),
        ("HW Power Brake Slowdown", "Active", "throttled: HW Power", "power supply", False),
        ("SRAM Uncorrectable", "2", "2 uncorrectable memory errors", "reboot the host", True),
        ("Remapping Failure Occurred", "Yes", "remapping a memory row failed", "RMA", True),
        ("Reset Required", "Yes", "it must be reset", "reset it", True),
        ("Pending Page Blacklist", "Yes", "wait for a reset", "reset it", False),
        ("GPU Current Temp", "ERR!", "can't read Temperature/GPU Current Temp", "RMA", True),
        ("Power Draw", "[Unknown Error]", "can't read", "RMA", True),
    ],
)
def test_each_problem_says_what_to_do(line, value, text, action, is_ill):
    first, second = parse(changed(line, value))
    (problem,) = first.problems
    assert text in problem.text
    assert action in problem.action
    assert first.is_ill == is_ill
    assert second.problems == ()


def test_card_with_half_of_its_lanes_is_named():
    narrow = recording("rtx4090-smi-q.txt").replace(
        " Current                   : 16x", " Current : 8x", 1
    )
    (problem,) = parse(narrow)[0].problems
    assert "PCIe has 8 of 16 lanes; reseat" in str(problem)


def test_lost_card_is_a_card_without_figures():
    *others, lost = parse(f"{recording('rtx4090-smi-q.txt')}\n{LOST}\n")
    assert len(others) == 2
    assert (lost.bus_id, lost.is_ill) == ("0000:5E:00.0", True)
    assert "replace the card" in str(lost.problems[0])
    (alone,) = parse("No devices were found\n")
    assert alone.is_ill


def test_no_output_is_no_card():
    assert parse("") == []
    assert parse("nonsense\n") == []


def test_xids_of_the_card_count_and_those_of_programs_do_not():
    found = xid_problems(recording("xid-lines.txt").splitlines())
    assert set(found) == {"0000:04:00", "0000:b3:00"}
    fallen, reset = found["0000:04:00"]
    assert "Xid 79: it has fallen off the bus" in str(fallen)
    assert "Xid 154: the driver asks for a reset" in str(reset)
    assert "Xid 79" in str(found["0000:b3:00"][0])


def test_address_has_one_form():
    assert gpu_health.short_address("00000000:5E:00.0") == "0000:5e:00"
    assert gpu_health.short_address("0000:5e:00") == "0000:5e:00"
