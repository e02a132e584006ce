"""Evaluations of a node over its life, one line each."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.limits import largest_file
from worker.errors import WorkerError
from worker.telemetry import evaluation_log
from worker.telemetry.evaluation_log import Evaluation, FamilyScore

SCORE = FamilyScore("gcd", 2, 24, 0.5, 0.3, 0.7, 0.4, 0.8, 8, closed=0.9, truncated=0.1)
FIRST = Evaluation(None, 0, 1000.0, 12.5, 0.5, (SCORE, replace(SCORE, family="sum", level=None)))


def test_lines_come_back_in_their_order(tmp_path: Path) -> None:
    later = replace(FIRST, round=9, rounds_trained=10, reward=0.75)
    evaluation_log.append(tmp_path, FIRST)
    evaluation_log.append(tmp_path, later)
    assert evaluation_log.read(tmp_path) == [FIRST, later]
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 2


def test_node_without_an_evaluation_has_none(tmp_path: Path) -> None:
    assert evaluation_log.read(tmp_path) == []


def test_last_line_that_a_crash_truncated_is_ignored(tmp_path: Path) -> None:
    evaluation_log.append(tmp_path, FIRST)
    file = tmp_path / "evaluations.jsonl"
    line = file.read_text()
    for length in (1, len(line) // 2, len(line) - 1):
        file.write_text(line + line[:length])
        assert evaluation_log.read(tmp_path) == [FIRST]


def test_line_that_a_crash_truncated_does_not_swallow_the_next(tmp_path: Path) -> None:
    evaluation_log.append(tmp_path, FIRST)
    file = tmp_path / "evaluations.jsonl"
    file.write_text(file.read_text() + '{"round": 9, "rou')
    later = replace(FIRST, round=9, rounds_trained=10)
    evaluation_log.append(tmp_path, later)
    assert evaluation_log.read(tmp_path) == [FIRST, later]


@pytest.mark.parametrize("line", ["{}", "[]", "not JSON", '{"round": "first"}'])
def test_line_of_something_else_is_an_error_that_names_the_file(tmp_path: Path, line: str) -> None:
    evaluation_log.append(tmp_path, FIRST)
    file = tmp_path / "evaluations.jsonl"
    with file.open("a") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(
        WorkerError, match=r"not a valid list of evaluations .* move it away"
    ) as bad:
        evaluation_log.read(tmp_path)
    assert str(file) in str(bad.value)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n", b"\0" * 10 + b"\n", b"\n", b'{"round": null}\n', b"[" * 9999 + b"\n"]
)
def test_bytes_of_something_else_are_an_error_that_names_the_file(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "evaluations.jsonl"
    file.write_bytes(content)
    with pytest.raises(WorkerError, match=r"not a valid list of evaluations .* move it away"):
        evaluation_log.read(tmp_path)


def test_zeros_that_a_power_failure_left_are_a_truncated_line(tmp_path: Path) -> None:
    evaluation_log.append(tmp_path, FIRST)
    with (tmp_path / "evaluations.jsonl").open("ab") as stream:
        stream.write(bytes(5000))
    assert evaluation_log.read(tmp_path) == [FIRST]
    evaluation_log.append(tmp_path, FIRST)
    assert evaluation_log.read(tmp_path) == [FIRST, FIRST]


SCORES = st.builds(
    FamilyScore,
    st.text(max_size=20),
    st.none() | st.integers(0, 9),
    st.integers(0, 999),
    *[st.floats(0, 1)] * 5,
    st.integers(1, 64),
    st.floats(0, 1),
    st.floats(0, 1),
    st.none() | st.floats(0, 2),
)


@given(st.lists(SCORES, max_size=3).map(tuple), st.none() | st.integers(0, 2**40), st.floats(0, 1))
def test_any_evaluation_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    scores: tuple[FamilyScore, ...],
    round: int | None,
    reward: float,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    evaluation = Evaluation(round, 7, 1e9, 0.5, reward, scores)
    evaluation_log.append(folder, evaluation)
    assert evaluation_log.read(folder) == [evaluation]


def test_disk_that_is_full_or_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        evaluation_log.append(tmp_path / "none", FIRST)
    with largest_file(100), pytest.raises(OSError, match="File too large"):
        evaluation_log.append(tmp_path, FIRST)
    assert evaluation_log.read(tmp_path) == []
