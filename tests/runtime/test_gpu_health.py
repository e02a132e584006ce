"""Health of GPUs, from recordings of nvidia-smi and of kernel logs (recordings/, with sources)."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Return a function that puts a shell script on the PATH as nvidia-smi."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu_health, "QUERY_SECONDS", 0.5)

    def put(script):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    return put


@pytest.mark.parametrize(
    ("script", "text", "is_ill"),
    [
        (f"echo '{LOST}' >&2; exit 1", "GPU3: 0000:5E:00.0", True),
        ("exec sleep 20", "did not answer within", True),
        (r"printf 'GPU is lost \\377\n'", "GPU is lost", True),
        ("echo something else; exit 9", "", False),
    ],
)
def test_program_that_fails_says_what_the_card_is(nvidia_smi, script, text, is_ill):
    nvidia_smi(script)
    cards = parse(gpu_health.query())
    assert [card.is_ill for card in cards] == ([True] if is_ill else [])
    assert all(text in card.problems[0].text for card in cards)


def test_program_is_asked_for_all_figures(nvidia_smi):
    nvidia_smi(f'[ "$*" = "-q" ] && cat {RECORDINGS}/rtx4090-smi-q.txt')
    assert [card.temperature for card in parse(gpu_health.query())][1] == 72


def test_machine_without_the_program_has_no_cards(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_health.query() == ""


def test_recording_that_is_cut_off_anywhere_is_no_problem_of_a_card():
    text = recording("rtx4090-smi-q.txt")
    for length in range(0, len(text), 97):
        cards = parse(text[:length])
        assert len(cards) <= 2
        assert not any(card.is_ill for card in cards)


@given(st.text(), st.text("GPU 0123456789abcdef:.\n ERR!ActiveYes", max_size=200))
def test_no_output_breaks_the_reader(any_text, similar):
    header = "GPU 00000000:01:00.0\n"
    for text in (any_text, similar, header + any_text, header + similar):
        for card in parse(text):
            assert all(problem.action for problem in card.problems)


def test_uncorrectable_errors_of_all_memories_add_up():
    text = """GPU 00000000:01:00.0
    ECC Errors
        Volatile
            SRAM Correctable          : 7
            SRAM Uncorrectable        : 2
            DRAM Uncorrectable        : 3
        Aggregate
            DRAM Uncorrectable        : 90
"""
    (card,) = parse(text)
    assert (card.ecc_uncorrected, card.is_ill) == (5, True)
    (healthy,) = parse(text.replace(": 2", ": 0").replace(": 3", ": 0"))
    assert (healthy.ecc_uncorrected, healthy.problems) == (0, ())


@pytest.mark.parametrize("number", [13, 31, 43, 45, 0, 999999])
def test_xid_of_a_program_is_no_problem_of_the_card(number):
    assert xid_problems([f"NVRM: Xid (PCI:0000:04:00): {number}, pid=1, x"]) == {}


@pytest.mark.parametrize("number", sorted(gpu_health._XIDS))
def test_xid_of_a_card_is_named_once_with_what_to_do(number):
    line = f"[1.0] NVRM: Xid (PCI:0000:04:00): {number}, pid='<unknown>', name=<unknown>"
    ((problem,),) = xid_problems([line, line]).values()
    assert problem.text.startswith(f"the kernel says Xid {number}: ")
    assert problem.action in (gpu_health.RESET, gpu_health.REPLACE, gpu_health.SEAT)


@given(st.lists(st.text()))
def test_no_kernel_log_breaks_the_reader(lines):
    assert isinstance(xid_problems(lines), dict)
