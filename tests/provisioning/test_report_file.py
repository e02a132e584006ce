"""The report of a run of pyinfra, as a file between two programs."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deploys.pyinfra_ext import report_file
from deploys.pyinfra_ext.report_file import HostRun, RunReport

_TEXTS = st.text(max_size=6)
_RUNS = st.builds(
    HostRun,
    state=st.sampled_from(["running", "done", "failed", "unreachable"]),
    operation=_TEXTS,
    output=_TEXTS,
    lacking=st.lists(_TEXTS, max_size=2),
)


@hypothesis_settings(max_examples=40, deadline=None, database=None)
@given(
    report=st.builds(
        RunReport,
        hosts=st.dictionaries(_TEXTS, _RUNS, max_size=3),
        refused=st.lists(_TEXTS, max_size=2),
        stopped=_TEXTS,
        warnings=st.lists(_TEXTS, max_size=2),
    )
)
def test_report_comes_back_as_it_was_written(
    report: RunReport, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "report.json"
    report.write(file)
    assert report_file.read(file) == report


def test_run_that_wrote_nothing_has_an_empty_report(tmp_path: Path) -> None:
    assert report_file.read(tmp_path / "report.json") == RunReport()


def test_report_of_a_release_without_newer_fields_is_read(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"hosts": {"gpu-1": {"state": "done"}}}))
    assert report_file.read(file) == RunReport(hosts={"gpu-1": HostRun(state="done")})


@pytest.mark.parametrize(
    ("operation", "output", "reason"),
    [
        ("Write x", "No space left", "Write x: No space left"),
        ("Write x", "", "Write x"),
        ("", "timed out", "timed out"),
        ("", "", ""),
    ],
)
def test_reason_has_the_operation_and_the_hosts_words(
    operation: str, output: str, reason: str
) -> None:
    assert HostRun(operation=operation, output=output).reason == reason


def test_runs_do_not_share_their_lists() -> None:
    HostRun().lacking.append("a GPU")
    assert HostRun().lacking == []
    assert RunReport().hosts == {}
