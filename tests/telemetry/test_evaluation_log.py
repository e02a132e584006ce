"""Evaluations of a node over its life, one line each."""

from dataclasses import replace
from pathlib import Path

import pytest

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
