"""pyinfra as a child process: a shell script that prints pyinfra 3.10.0's output."""

import json
import os
import time
from pathlib import Path

import pytest

from deploys.fleet.pyinfra_process import Pyinfra
from deploys.pyinfra_ext import report_file
from deploys.pyinfra_ext.report_file import HostRun, RunReport
from worker.errors import SettingsError, WorkerError

FAILED = """--> Connecting to hosts...
    [gpu-1] Connected
--> Starting operation: Release | Check out 0123456789ab
    [gpu-1] fatal: write error: No space left on device
    [gpu-1] fatal: fetch-pack: invalid index-pack output
    [gpu-1] hivewright-worker@0.service: Consumed 9.022s CPU time.
    [gpu-1] Error: executed 0 commands
--> Disconnecting from hosts...
--> pyinfra error: No hosts remaining!
failed: gpu-1 (Release | Check out 0123456789ab); fix these hosts and run again
"""
CHECK_OUT = "Release | Check out 0123456789ab"
NO_SPACE = "fatal: write error: No space left on device"
UNREACHABLE = RunReport({"gpu-1": HostRun("unreachable", "", "Could not connect (timed out)")})


def standing_in(
    folder: Path,
    stdout: str = "",
    stderr: str = "",
    code: int = 0,
    seconds: float = 0,
    report: RunReport | None = None,
) -> Pyinfra:
    (folder / "stdout").write_text(stdout)
    (folder / "stderr").write_text(stderr)
    script = f"cat {folder}/stdout; cat {folder}/stderr >&2; echo $$ > {folder}/pid;"
    if report is not None:
        report.write(folder / "report")
        script += f" cp {folder}/report ${report_file.REPORT_VARIABLE};"
    script += f" sleep {seconds}; exit {code}"
    return Pyinfra("inventory/x.py", prefix=("sh", "-c", script))


def test_deploy_that_succeeds_says_how_much_it_changed(tmp_path: Path) -> None:
    results = {
        "results": {"operations": [], "totals": {"success": 7, "no_change": 20}, "failed_hosts": []}
    }
    ran = standing_in(tmp_path, json.dumps(results)).deploy(
        "gpu-1", None, tmp_path / "log", timeout=10
    )
    assert (ran.outcome, ran.num_changes) == ("done", 7)


def test_deploy_that_fails_says_at_what_and_what_the_host_said(tmp_path: Path) -> None:
    report = RunReport({"gpu-1": HostRun("failed", CHECK_OUT, NO_SPACE)})
    pyinfra = standing_in(tmp_path, stderr=FAILED, code=1, report=report)
    ran = pyinfra.deploy("gpu-1", None, tmp_path / "log", timeout=10)
    assert ran.outcome == "failed"
    assert (
        ran.reason
        == "Release | Check out 0123456789ab: fatal: write error: No space left on device"
    )
    assert (tmp_path / "log").read_text() == FAILED


def test_host_without_a_connection_is_unreachable(tmp_path: Path) -> None:
    pyinfra = standing_in(tmp_path, code=1, report=UNREACHABLE)
    ran = pyinfra.deploy("gpu-1", None, tmp_path / "log", timeout=10)
    assert (ran.outcome, ran.reason) == (
        "unreachable",
        "can't be reached: Could not connect (timed out)",
    )
    assert pyinfra.facts("a.B", "c.D", "x=1", hosts=["gpu-1"], timeout=10).values == [{}, {}]


def test_silent_host_has_its_reason_and_the_others_answers_are_whole(tmp_path: Path) -> None:
    report = RunReport(
        {
            "gpu-1": HostRun("unreachable", "", "Could not connect (timed out)"),
            "gpu-2": HostRun("done", "", "Command timed out after 50s"),
            "gpu-3": HostRun("done"),
        }
    )
    values = {"a.B": {"gpu-2": 1, "gpu-3": 1}, "c.D": {"gpu-2": None, "gpu-3": 1}}
    pyinfra = standing_in(tmp_path, json.dumps(values), report=report)
    found = pyinfra.facts("a.B", "c.D", hosts=["gpu-1", "gpu-2", "gpu-3"], timeout=10)
    assert found.values == [{"gpu-2": 1, "gpu-3": 1}, {"gpu-3": 1}]
    assert found.reasons == {
        "gpu-1": "Could not connect (timed out)",
        "gpu-2": "Command timed out after 50s",
    }


def test_host_that_hangs_is_given_up_at_its_deadline_with_all_that_was_started(
    tmp_path: Path,
) -> None:
    report = RunReport({"gpu-1": HostRun(operation="Worker | Run slot 0")})
    began = time.monotonic()
    ran = standing_in(tmp_path, seconds=60, report=report).deploy(
        "gpu-1", None, tmp_path / "log", timeout=1
    )
    assert time.monotonic() - began < 20
    assert (ran.outcome, ran.reason) == (
        "overdue",
        "not done after 1 s, stopped; it was at: Worker | Run slot 0",
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_inventory_that_is_refused_ends_it_all(tmp_path: Path) -> None:
    report = RunReport(refused=["inventory data of gpu-1: slot: not a known key"])
    refused = standing_in(tmp_path, code=2, report=report)
    with pytest.raises(SettingsError, match="not a known key"):
        refused.deploy("gpu-1", None, tmp_path / "log", timeout=10)


def test_answer_that_is_none_is_an_error_with_the_last_line(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="it broke"):
        standing_in(tmp_path, stderr="a\nit broke\n", code=1).facts("a.B", hosts=["a"], timeout=10)


def test_inventory_without_hosts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no hosts; expected lists of hosts"):
        standing_in(tmp_path, "[]").hosts(timeout=10)


def test_every_line_of_a_refusal_is_kept(tmp_path: Path) -> None:
    said = ["x.py: 2 mistakes", "inventory data of gpu-1: one", "inventory data of gpu-2: two"]
    with pytest.raises(SettingsError) as refused:
        standing_in(
            tmp_path, stderr="--> Loading config...\n", code=2, report=RunReport(refused=said)
        ).hosts(timeout=10)
    assert str(refused.value).splitlines() == said


def test_warnings_about_an_inventory_are_passed_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    listed = json.dumps([{"name": "gpu-1", "groups": ["workers"], "data": {}}])
    report = RunReport(warnings=["warning: inventory data of gpu-1: odd"])
    assert (
        len(
            standing_in(tmp_path, listed, "--> Loading config...\n", report=report).hosts(
                timeout=10
            )
        )
        == 1
    )
    assert capfd.readouterr().err == "warning: inventory data of gpu-1: odd\n"


def test_host_that_is_deployed_without_something_is_done(tmp_path: Path) -> None:
    report = RunReport({"gpu-1": HostRun("done", lacking=["443: not shown", "80: not shown"])})
    results = json.dumps({"results": {"totals": {"success": 7}}})
    ran = standing_in(tmp_path, results, code=1, report=report).deploy(
        "gpu-1", None, tmp_path / "log", timeout=10
    )
    assert (ran.outcome, ran.reason, ran.num_changes) == (
        "done",
        "443: not shown; 80: not shown",
        7,
    )


def test_run_that_was_stopped_for_the_whole_fleet_says_why(tmp_path: Path) -> None:
    report = RunReport({"gpu-1": HostRun("done")}, stopped="gpu-1 and gpu-2 have one identity")
    ran = standing_in(tmp_path, code=1, report=report).deploy(
        "gpu-1", None, tmp_path / "log", timeout=10
    )
    assert (ran.outcome, ran.reason) == ("failed", "gpu-1 and gpu-2 have one identity")


def test_report_reads_back_as_it_was_written(tmp_path: Path) -> None:
    report = RunReport({"gpu-1": HostRun("failed", "a", "b", ["c"])}, ["d"], "e", ["f"])
    report.write(tmp_path / "report")
    assert report_file.read(tmp_path / "report") == report
    assert report_file.read(tmp_path / "none") == RunReport()


def test_pyinfra_that_does_not_end_is_stopped_and_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="had not ended after 1 s"):
        standing_in(tmp_path, seconds=60).hosts(timeout=1)
