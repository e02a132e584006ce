"""A worker's card: which one it is, and that a worker on an ill one stops with its reason."""

import os
import re
from pathlib import Path

import pytest

from tests.runtime.test_gpu_health import LOST, changed, recording
from tests.unit.test_node import enrolled
from worker import node
from worker.errors import DeviceIll, ResourceError
from worker.runtime.gpu_health import parse
from worker.telemetry import status
from worker.telemetry.gpu_watch import GpuWatch, choose

ROOT = Path(__file__).resolve().parents[2]
UUID = "GPU-370465f5-30e0-6877-b85c-16729f41b90f"


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Put a program in PATH that prints the recording in `answer`."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/answer\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "answer"


def test_worker_on_a_well_card_trains_and_on_an_ill_one_stops_with_what_to_do(answer: Path):
    answer.write_text(recording("rtx4090-smi-q.txt"))
    watch = GpuWatch(UUID)
    try:
        assert watch.card is not None
        assert watch.card.temperature == 30
        watch.require_healthy()
        answer.write_text(changed("Remapping Failure Occurred", "Yes"))
        watch.look()
        with pytest.raises(DeviceIll, match=r"RTX 4090 at .*remapping a memory row failed.*RMA"):
            watch.require_healthy()
    finally:
        watch.close()
    assert (DeviceIll.exit_code, issubclass(DeviceIll, ResourceError)) == (11, True)


def test_worker_on_an_ill_card_ends_before_a_round_and_its_status_has_the_reason(
    answer: Path, tmp_path: Path, monkeypatch
):
    answer.write_text(changed("Remapping Failure Occurred", "Yes"))
    monkeypatch.setattr(node.device, "gpu_uuid", lambda _: UUID)
    monkeypatch.setattr(node, "exit_on_signals", lambda: None)
    with pytest.raises(DeviceIll, match=r"RMA.*then start this worker again"):
        node.run(enrolled(tmp_path / "node"))
    told = status.read(tmp_path / "node")
    assert told is not None
    assert (told.state, told.rounds_trained) == ("failed", 0)
    assert told.last_error is not None
    assert "remapping a memory row failed; reboot the host" in told.last_error
    unit = (ROOT / "templates/service.j2").read_text()
    (codes,) = re.findall(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)
    assert str(DeviceIll.exit_code) in codes.split()


def test_one_answer_that_came_too_late_does_not_end_a_worker(answer: Path):
    answer.write_text("Unknown Error: nvidia-smi did not answer within 20 s")
    watch = GpuWatch(UUID)
    try:
        assert watch.card is not None
        assert watch.card.is_ill
        answer.write_text(recording("rtx4090-smi-q.txt"))
        watch.require_healthy()
    finally:
        watch.close()


def test_thread_sees_a_change_by_itself(answer: Path):
    answer.write_text(recording("rtx4090-smi-q.txt"))
    watch = GpuWatch(UUID, every_seconds=0.05)
    answer.write_text(changed("Reset Required", "Yes"))
    for _ in range(200):
        if watch.card is not None and watch.card.is_ill:
            break
        watch._end.wait(0.05)
    watch.close()
    assert watch.card is not None
    assert watch.card.is_ill


def test_neighbour_s_illness_is_not_ours_and_a_missing_card_is_the_lost_one():
    text = recording("rtx4090-smi-q.txt")
    cards = parse(f"{text}\n{LOST}\n")
    own = choose(cards, UUID)
    assert own is not None
    assert own.problems == ()
    lost = choose(cards, "GPU-of-card-3")
    assert lost is not None
    assert lost.is_ill
    assert choose(parse(text), "GPU-of-card-3") is None


def test_model_on_a_cpu_is_not_watched(answer: Path):
    watch = GpuWatch(None)
    watch.look()
    watch.require_healthy()
    watch.close()
    assert watch.card is None
