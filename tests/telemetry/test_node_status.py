"""status.json and rounds.jsonl are atomic: a crash within a line loses only that line."""

import json
import subprocess

import pytest

from worker.errors import ModelError, ResourceError, WorkerError
from worker.swarm.status import SwarmStatus
from worker.telemetry import status
from worker.telemetry.status import NodeStatus, RoundRecord


def record(round):
    return RoundRecord(
        round, 1.0, 0.5, 0.1, 0.2, ("QmA",), 4, 4, {}, {"no-signal-local": 1}, 100.0, 1.0, None
    )


def test_status_survives_a_round_trip(tmp_path):
    written = NodeStatus("w", "Qm", "a b c", "m", "0.1.0", ledger={"earned": 1})
    written.swarm = SwarmStatus("connected", "Qm", 3, ("QmA",), {"seed": 2}, newest_group_at=1.5)
    written.write(tmp_path)
    assert status.read(tmp_path) == written
    assert status.read(tmp_path / "nowhere") is None


def test_process_that_is_gone_has_died(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    node = NodeStatus("w", "Qm", "a b c", "m", "0.1.0", pid=child.pid, state="connected")
    node.write(tmp_path)
    assert status.read(tmp_path).state == "died"
    node.state = "stopped"
    node.write(tmp_path)
    assert status.read(tmp_path).state == "stopped"


def test_error_that_ends_a_node_is_its_last_word(tmp_path):
    status.write_failure(tmp_path, ModelError("model x: not here"))
    assert status.read(tmp_path) is None
    NodeStatus("w", "Qm", "a b c", "m", "0.1.0").write(tmp_path)
    status.write_failure(tmp_path, ModelError("model x: not here"))
    node = status.read(tmp_path)
    assert (node.state, node.last_error) == ("failed", "model x: not here")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"name": 1}'])
def test_status_of_something_else_is_explained(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(
        WorkerError,
        match=r"status.json: not a status of this version .*; restart the worker",
    ):
        status.read(tmp_path)


@pytest.mark.parametrize("torn", ["", '{"round": 7, "fini', "x" * 10])
def test_torn_line_loses_itself_and_not_the_next(tmp_path, torn):
    record(1).append(tmp_path)
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write(torn)
    assert [line["round"] for line in status.read_rounds(tmp_path)] == [1]
    record(2).append(tmp_path)
    assert [line["round"] for line in status.read_rounds(tmp_path)] == [1, 2]
    assert all(json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines())


def test_full_disk_is_named_with_the_file():
    """/dev/full stands for a disk without room."""
    from pathlib import Path

    with pytest.raises(
        ResourceError, match=r"status.json: can't be written: .*; make room or rights"
    ):
        NodeStatus("w", "Qm", "a b c", "m", "0.1.0").write(Path("/proc"))
