"""The report at the end of a pyinfra run: for people in its last lines, for programs as JSON."""

import json
import logging
from collections import defaultdict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyinfra.api.exceptions import DeployError

from deploys.pyinfra_ext import report_file, run_report
from deploys.pyinfra_ext.report_file import HostRun, RunReport


@pytest.fixture(autouse=True)
def _new_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the run before: the module has one for its process."""
    monkeypatch.setattr(run_report, "_notes", [])
    monkeypatch.setattr(run_report, "_interruptions", [])
    monkeypatch.setattr(run_report, "_lacking", defaultdict(list))
    lines: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=run_report.NUM_LINES))
    monkeypatch.setattr(run_report, "_lines", lines)
    monkeypatch.setattr(run_report, "_report", RunReport())


def log(*lines: str) -> None:
    """Log as pyinfra does."""
    handler = run_report._Lines()
    for line in lines:
        handler.emit(logging.LogRecord("pyinfra", logging.INFO, "", 0, line, (), None))


def explanation(name: str) -> str:
    host: Any = SimpleNamespace(name=name)
    return run_report._explanation(host)


def test_reason_of_a_failure_is_the_last_line_that_says_something() -> None:
    log(
        "[gpu-1] Connected",
        "[gpu-2] no route",
        "[gpu-1] E: Unable to locate package",
        "[gpu-1] Error: executed 0 commands",
        "[gpu-1] Failed to start the service",
        "[gpu-1] ",
        "starting operation",
    )
    assert explanation("gpu-1") == "E: Unable to locate package"
    assert explanation("gpu-2") == "no route"
    assert explanation("gpu-3") == ""


def test_full_disk_is_the_reason_whatever_comes_after() -> None:
    log("[gpu-1] write error: No space left on device", "[gpu-1] tar: Exiting with failure status")
    assert explanation("gpu-1") == "write error: No space left on device"


def test_colours_are_not_part_of_a_reason() -> None:
    log("\x1b[31m[gpu-1]\x1b[0m \x1b[33mbroken pipe\x1b[0m")
    assert explanation("gpu-1") == "broken pipe"


def test_old_lines_of_a_talkative_host_are_forgotten() -> None:
    log("[gpu-1] first", *["[gpu-1] Success"] * run_report.NUM_LINES)
    assert explanation("gpu-1") == ""


def test_last_lines_are_notes_and_what_hosts_lack_each_once() -> None:
    for _ in range(2):
        run_report.note("gpu-2: a card is dead; the other GPUs are used")
        run_report.problem("gpu-1", "not in the tailnet")
    run_report.problem("gpu-1", "no HTTPS")
    assert run_report._last_lines(None) == [
        "note: gpu-2: a card is dead; the other GPUs are used",
        "done, but gpu-1: no HTTPS",
        "done, but gpu-1: not in the tailnet",
    ]


def test_run_that_is_stopped_says_that_nothing_was_done_and_why() -> None:
    errors = [run_report.stop("two workers have one identity"), run_report.stop("another reason")]
    assert all(isinstance(error, DeployError) for error in errors)
    run_report.problem("gpu-1", "not in the tailnet")
    assert run_report._last_lines(None) == [
        "nothing was done on any host: two workers have one identity"
    ]


def test_interruption_is_all_that_is_said() -> None:
    run_report.note("a note")
    run_report._interruptions.append(2)
    assert run_report._last_lines(None) == [
        "interrupted: no host was left half done; run it again to continue"
    ]


def test_mistakes_and_warnings_are_printed_and_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(report_file.REPORT_VARIABLE, str(tmp_path / "report"))
    run_report.warn("warning: slots: more than there are GPUs")
    run_report.refuse(["slots: got 0", "node_name: got 7"])
    run_report._write()
    assert capsys.readouterr().err.splitlines() == [
        "warning: slots: more than there are GPUs",
        "slots: got 0",
        "node_name: got 7",
    ]
    report = report_file.read(tmp_path / "report")
    assert report.refused == ["slots: got 0", "node_name: got 7"]
    assert report.warnings == ["warning: slots: more than there are GPUs"]


def test_without_a_program_that_waits_for_it_no_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(report_file.REPORT_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    run_report._write()
    assert list(tmp_path.iterdir()) == []


def test_report_comes_back_and_a_run_that_wrote_none_is_empty(tmp_path: Path) -> None:
    hosts = {"gpu-1": HostRun("failed", "Run slot 0", "no such device", ["not in the tailnet"])}
    report = RunReport(hosts, ["slots: got 0"], "stopped", ["a warning"])
    report.write(tmp_path / "report")
    assert report_file.read(tmp_path / "report") == report
    assert json.loads((tmp_path / "report").read_text())["hosts"]["gpu-1"]["state"] == "failed"
    assert report_file.read(tmp_path / "none") == RunReport()


@pytest.mark.parametrize(
    ("operation", "output", "reason"),
    [
        ("Run slot 0", "no such device", "Run slot 0: no such device"),
        ("", "no route", "no route"),
        ("Run slot 0", "", "Run slot 0"),
        ("", "", ""),
    ],
)
def test_reason_is_what_is_known_of_operation_and_output(
    operation: str, output: str, reason: str
) -> None:
    assert HostRun("failed", operation, output).reason == reason
