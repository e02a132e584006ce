"""status.json and rounds.jsonl are atomic: a crash within a line loses only that line."""

import json
import math
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.limits import largest_file
from worker.errors import DeviceIll, ModelError, ResourceError, WorkerError
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
    with pytest.raises(
        ResourceError, match=r"status.json: can't be written: .*; make room or rights"
    ):
        NodeStatus("w", "Qm", "a b c", "m", "0.1.0").write(Path("/proc"))


def node(**fields) -> NodeStatus:
    return NodeStatus("w", "Qm", "a b c", "m", "0.1.0", **fields)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, 0.0])
def test_figures_of_a_failed_step_do_not_make_the_status_unreadable(tmp_path, value):
    written = node(
        loss=value, last_round=replace(record(1), loss=value, quality={"entropy": value})
    )
    written.write(tmp_path)
    found = status.read(tmp_path)
    assert found.loss == pytest.approx(value, nan_ok=True)
    assert found.last_round.quality["entropy"] == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("content", ["", "{", "[]", "\0" * 50])
@pytest.mark.parametrize("error", [ModelError("model x: not here"), DeviceIll("the card is ill")])
def test_status_of_another_version_does_not_hide_why_a_node_ends(tmp_path, caplog, content, error):
    (tmp_path / "status.json").write_text(content)
    status.write_failure(tmp_path, error)
    assert "final status not written" in caplog.text
    assert "not a status of this version" in caplog.text
    assert (tmp_path / "status.json").read_text() == content


def test_full_disk_does_not_hide_why_a_node_ends(tmp_path, caplog):
    node().write(tmp_path)
    with largest_file(50):
        status.write_failure(tmp_path, ModelError("model x: not here"))
    assert "final status not written" in caplog.text
    assert status.read(tmp_path).state == "starting"


def test_error_in_the_status_has_no_credentials(tmp_path):
    node().write(tmp_path)
    status.write_failure(tmp_path, ModelError("http://me:hunter2@hub.example: refused"))
    assert status.read(tmp_path).last_error == "http://[redacted]@hub.example: refused"


@pytest.mark.parametrize(
    ("state", "pid", "shown"),
    [
        ("starting", None, "starting"),
        ("connected", None, "connected"),
        ("connected", 2**31 - 1, "died"),
        ("starting", 2**31 - 1, "died"),
        ("stopped", 2**31 - 1, "stopped"),
        ("failed", 2**31 - 1, "failed"),
    ],
)
def test_state_of_a_process_that_is_gone(tmp_path, state, pid, shown):
    node(state=state, pid=os.getpid() if pid is None else pid).write(tmp_path)
    assert status.read(tmp_path).state == shown


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"state": "asleep"}, "state"),
        ({"round": "seven"}, "round"),
        ({"rounds_trained": None}, "rounds_trained"),
        ({"ledger": {"earned": 1.5}}, "ledger/earned"),
        ({"warnings": [{"check": "x"}]}, "warnings/0/severity"),
    ],
)
def test_value_of_another_version_is_named(tmp_path, change, where):
    content = json.loads(json.dumps(asdict(node()))) | change
    (tmp_path / "status.json").write_text(json.dumps(content))
    with pytest.raises(WorkerError, match=rf"not a status of this version \({where}: "):
        status.read(tmp_path)


def test_status_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "status.json").mkdir()
    with pytest.raises(WorkerError, match=r"status.json: not a status .*Is a directory"):
        status.read(tmp_path)


@pytest.mark.usefixtures("usual_recursion_limit")
@pytest.mark.parametrize(
    "line",
    [
        b"not JSON",
        b"\xff\xfe",
        b"\0\0\0",
        b"7",
        b"null",
        b"[]",
        b"{}",
        b'{"round": [1]}',
        b'{"part": 1}',
        b"",
        b"[" * 100_000,
    ],
)
def test_damaged_line_of_the_history_is_named(tmp_path, line):
    record(1).append(tmp_path)
    file = tmp_path / "rounds.jsonl"
    file.write_bytes(file.read_bytes() + line + b"\n")
    for read in (status.read_rounds, status.read_parts):
        with pytest.raises(WorkerError, match=rf"^{file}: line 2 is not of a round; remove that"):
            read(tmp_path)


PLACES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=12)


@given(PLACES)
def test_history_has_each_part_once_and_its_latest_line(tmp_path_factory, places):
    folder = tmp_path_factory.mktemp("history")
    latest = {}
    for number, (round, part) in enumerate(places):
        replace(record(round), part=part, loss=float(number)).append(folder)
        latest[round, part] = float(number)
    found = {(line["round"], line["part"]): line["loss"] for line in status.read_parts(folder)}
    assert found == latest
    rounds = [line["round"] for line in status.read_rounds(folder)]
    assert sorted(rounds) == sorted(round for round, part in latest if part == 0)


def test_history_is_followed_line_by_line(tmp_path):
    assert status.read_lines(tmp_path, 0) == ([], 0)
    record(1).append(tmp_path)
    lines, position = status.read_lines(tmp_path, 0)
    assert [line["round"] for line in lines] == [1]
    file = tmp_path / "rounds.jsonl"
    assert position == file.stat().st_size
    file.write_bytes(file.read_bytes() + b'{"round": 2')
    assert status.read_lines(tmp_path, position) == ([], position)
    file.write_bytes(file.read_bytes() + b"}\n[]\n")
    with pytest.raises(WorkerError, match=f"after byte {position}: line 2 is not of a round"):
        status.read_lines(tmp_path, position)


def test_history_without_a_file_is_empty(tmp_path):
    assert status.read_rounds(tmp_path) == []


def test_round_of_a_checkpoint_is_added_once(tmp_path):
    record(1).append(tmp_path)
    for _ in range(2):
        status.complete_rounds(tmp_path, asdict(record(2)))
    status.complete_rounds(tmp_path, asdict(replace(record(2), part=1)))
    assert [(line["round"], line["part"]) for line in status.read_parts(tmp_path)] == [
        (1, 0),
        (2, 0),
        (2, 1),
    ]


@pytest.mark.parametrize("raw", [{}, {"round": 1}, asdict(record(1)) | {"round": "one"}])
def test_checkpoint_without_a_round_is_refused(tmp_path, raw):
    with pytest.raises(ValueError, match="RoundRecord"):
        status.complete_rounds(tmp_path, raw)
    assert not (tmp_path / "rounds.jsonl").exists()


def test_line_of_an_earlier_version_is_a_record():
    old = asdict(record(3))
    for name in ("quality", "part", "parts", "behind", "families", "seconds_by", "closed"):
        del old[name]
    found = status.as_record(old)
    assert (found.part, found.parts, found.quality, found.families) == (0, 1, {}, ())


def test_round_that_can_not_be_written_names_the_file(tmp_path):
    with pytest.raises(ResourceError, match=r"rounds.jsonl: can't be written: No such file"):
        record(1).append(tmp_path / "none")
    with largest_file(10), pytest.raises(ResourceError, match="File too large; make room"):
        record(1).append(tmp_path)
