"""The report of a rollout: it survives a crash, can be resumed from, and is read by people."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from deploys.fleet import report as report_module
from deploys.fleet.report import HostReport, Report
from worker.errors import SettingsError

OLD, NEW = "a" * 40, "b" * 40


def make_report() -> Report:
    hosts = {
        "gpu-1": HostReport(NEW, OLD, "done", batch=1, seconds=61.4, num_changes=3),
        "gpu-2": HostReport(NEW, OLD, "failed", "no room on the disk", 2, seconds=5),
        "gpu-3": HostReport(NEW, None, "rolled-back", "does not train", 2),
        "gpu-4": HostReport(NEW, OLD, "pending"),
        "gpu-5": HostReport(NEW, NEW, "done", batch=2),
    }
    return Report("inventory/mine.py", hosts, started_at=1000.0)


def shown(report: Report, width: int = 120) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(report_module.table(report))
    return output.getvalue()


def test_report_comes_back_as_it_was_written(tmp_path: Path) -> None:
    report = make_report()
    report.write(tmp_path / "report.json")
    assert report_module.read(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["version"] == 1


def test_hosts_by_their_fate_in_the_inventory_s_order() -> None:
    report = make_report()
    assert report.those("done") == ["gpu-1", "gpu-5"]
    assert report.those("pending", "failed") == ["gpu-2", "gpu-4"]
    assert report.those("stuck") == []


def test_resuming_without_a_rollout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no rollout to resume; start one without"):
        report_module.read(tmp_path / "report.json")


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"inventory": "x"}', '{"inventory": "x", "hosts": {"a": {"fate": "lucky"}}}'],
)
def test_file_that_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(content)
    with pytest.raises(SettingsError, match=rf"{file}: .*; expected the report of a rollout"):
        report_module.read(file)


def test_table_has_touched_hosts_with_the_change_of_their_release() -> None:
    lines = shown(make_report()).splitlines()
    assert lines[0].split() == ["host", "batch", "s", "release", "result", "reason"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert "gpu-4" not in rows
    assert rows["gpu-1"] == ["1", "61", "aaaaaaa", ">", "bbbbbbb", "done"]
    # What a host still has, rather than what it did not get.
    assert rows["gpu-2"][:4] == ["2", "5", "aaaaaaa", "failed"]
    assert rows["gpu-3"][:4] == ["2", "0", "none", "rolled-back"]
    assert rows["gpu-5"] == ["2", "0", "bbbbbbb", "done"]
    assert "no room on the disk" in lines[2]


def test_narrow_terminal_wraps_names_and_reasons_and_loses_nothing() -> None:
    report = Report("x", {"a" * 40: HostReport(NEW, OLD, "failed", "b" * 60)})
    text = shown(report, width=80)
    assert text.count("a") >= 40
    assert text.count("b") >= 60
    assert max(map(len, text.splitlines())) <= 80


def test_escapes_in_a_reason_do_not_reach_the_terminal() -> None:
    report = Report("x", {"gpu-1": HostReport(NEW, OLD, "failed", "\x1b[31m[red]boo[/red]")})
    assert "\x1b" not in shown(report)
    assert "[red]boo[/red]" in shown(report)


def test_summary_counts_every_host() -> None:
    assert report_module.summary(make_report()) == "2 done, 1 failed, 1 rolled-back, 1 untouched"
