"""Decisions of the rollout, with a stand-in for pyinfra and invented hosts."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploys.fleet import health_gate, report
from deploys.fleet.batches import Batch, Size, next_batch
from deploys.fleet.pyinfra_process import CHECKOUT, Ran
from deploys.fleet.report import HostReport, Report
from deploys.fleet.rollout import Rollout, Rules, Seen
from deploys.fleet.rollout_command import _resumed
from worker.errors import SettingsError
from worker.telemetry import health

OLD, NEW = "a" * 40, "b" * 40
INVENTORY = str(CHECKOUT / "inventory/x.py")
WANTED = health_gate.Wanted(rounds=1, reward_share=0.5, credits=True)
RULES = Rules(Size(25, True), WANTED, gate_seconds=0.05, look_every_seconds=0.01)


def worker(**changes: Any) -> dict[str, Any]:
    """Return a NodeReport of a worker that has finished a round since its start."""
    report = {
        "unit": "hivewright-worker@0.service",
        "active_state": "active",
        "status": {"activity": "training", "last_error": None},
        "started_at": 1000.0,
        "restarts": 0,
        "exit_status": 0,
        "finished": [900.0, 1010.0],
    }
    return report | changes


def keeper(round: int | None, expected: int = 2, **changes: Any) -> dict[str, Any]:
    status = {"state": "round-open", "round": round, "reporters": 1, "expected": expected}
    return worker(unit="hivewright-keeper.service", status=status, finished=[], **changes)


def paid(
    before: list[float | None], since: Sequence[float | None] = (), confirmed: int = 0
) -> dict[str, Any]:
    """Return a worker with rewards before and since its start, and confirmed rewards."""
    finished = [900.0 + n for n in range(len(before))] + [1010.0 + n for n in range(len(since))]
    status = {"activity": "training", "last_error": None, "ledger": {"confirmed": confirmed}}
    return worker(finished=finished, rewards=[*before, *since], status=status)


class RecordedFleet:
    """Stands in for pyinfra and its hosts; `troubles`: failures of a host's deploy."""

    def __init__(self, names: Sequence[str], troubles: dict[str, Any] | None = None) -> None:
        self.state = {name: {"commit": OLD, "deployed": OLD, "previous": None} for name in names}
        self.reports = {name: [worker()] for name in names}
        self.troubles = troubles or {}
        self.deployed: list[str] = []
        self.went_back: list[str] = []
        self.reasons: set[str] = set()
        self.is_stopped = False

    def deploy(self, host: str, commit: str) -> Ran:
        self.deployed.append(host)
        trouble = self.troubles.get(host)
        if isinstance(trouble, Ran):
            return trouble
        self.state[host] = {
            "commit": commit,
            "deployed": commit,
            "previous": self.state[host]["commit"],
        }
        if trouble == "gone":
            del self.state[host]
        elif trouble is not None:
            self.reports[host] = [trouble]
        return Ran("done", num_changes=4)

    def look(self, hosts: Sequence[str]) -> dict[str, Seen]:
        return {
            name: Seen(self.state[name], self.reports[name]) for name in hosts if name in self.state
        }

    def go_back(self, host: str, reason: str) -> Ran:
        self.went_back.append(host)
        self.reasons.add(reason)
        self.state[host] = {"commit": OLD, "deployed": OLD, "previous": OLD}
        return Ran("done")

    def stop(self) -> None:
        self.is_stopped = True


def rolled_out(fleet: RecordedFleet, names: Sequence[str], so_far: Report | None = None) -> Report:
    so_far = so_far or Report("inventory/x.py", {name: HostReport(NEW) for name in names})
    rollout = Rollout(
        fleet, RULES, [n for n in names if n == "hub"], so_far, lambda _: None, lambda _: None
    )
    rollout.run()
    return rollout.report


HOSTS = [f"gpu-{number:02}" for number in range(1, 21)]


def test_twenty_hosts_get_it_in_batches_one_first() -> None:
    done = rolled_out(RecordedFleet(HOSTS), HOSTS)
    assert done.result == "done"
    batches = [done.hosts[name].batch for name in HOSTS]
    assert [batches.count(number) for number in range(1, 6)] == [1, 5, 5, 5, 4]


def test_bad_release_reaches_one_host_of_twenty_and_goes_back() -> None:
    ill = worker(active_state="failed", exit_status=1, status={"last_error": "boom"})
    fleet = RecordedFleet(HOSTS, {"gpu-01": ill})
    done = rolled_out(fleet, HOSTS)
    assert done.result == "rolled-back"
    assert (fleet.deployed, fleet.went_back) == (["gpu-01"], ["gpu-01"])
    assert done.hosts["gpu-01"].fate == "rolled-back"
    assert len(done.those("pending")) == 19
    assert "boom" in done.reason


def test_release_that_runs_and_does_not_train_goes_back_everywhere() -> None:
    fleet = RecordedFleet(HOSTS, {"gpu-04": worker(finished=[900.0])})
    done = rolled_out(fleet, HOSTS)
    assert sorted(fleet.went_back) == sorted(fleet.deployed) == HOSTS[:6]
    assert "0 of 1 rounds" in done.reason
    # Each host keeps the whole reason, also one that did nothing wrong.
    assert fleet.reasons == {f"a rollout's gate refused it: {done.reason}"}
    assert done.reason.startswith("gpu-04: worker@0 has finished 0 of 1 rounds, it is training")


def test_hosts_with_troubles_of_their_own_hold_nobody_up_and_resume_takes_only_those() -> None:
    troubles: dict[str, Any] = {
        "gpu-01": Ran("overdue", "not done after 5 s"),
        "gpu-03": Ran("unreachable", "can't be reached"),
        "gpu-05": "gone",
        "gpu-07": worker(active_state="failed", exit_status=4, status={"last_error": "disk full"}),
    }
    fleet = RecordedFleet(HOSTS, troubles)
    del fleet.state["gpu-09"]
    done = rolled_out(fleet, HOSTS)
    fates = {name: host.fate for name, host in done.hosts.items() if host.fate != "done"}
    assert fates == {
        "gpu-01": "overdue",
        "gpu-03": "unreachable",
        "gpu-05": "lost",
        "gpu-07": "lost",
        "gpu-09": "unreachable",
    }
    assert done.result == "incomplete"
    assert fleet.went_back == []
    mended = RecordedFleet(HOSTS)
    for name in fates:
        done.hosts[name].fate = "pending"
    assert rolled_out(mended, HOSTS, done).result == "done"
    assert sorted(mended.deployed) == sorted(fates)


def test_deploy_that_fails_before_it_changes_anything_is_the_hosts_own_trouble() -> None:
    fleet = RecordedFleet(
        HOSTS[:4], {"gpu-02": Ran("failed", "Check out: no space left on device")}
    )
    done = rolled_out(fleet, HOSTS[:4])
    assert done.those("failed") == ["gpu-02"]
    assert len(done.those("done")) == 3


def test_deploy_that_fails_because_the_service_does_not_start_is_the_releases() -> None:
    fleet = RecordedFleet(HOSTS[:4], {"gpu-01": Ran("failed", "Run slot 0")})
    fleet.reports["gpu-01"] = [worker(active_state="failed", exit_status=1)]
    fleet.state["gpu-01"]["previous"] = OLD

    def deploy(host: str, commit: str) -> Ran:
        fleet.state[host] = {"commit": commit, "deployed": None, "previous": OLD}
        return Ran("failed", "Run slot 0")

    fleet.deploy = deploy  # type: ignore[method-assign]
    done = rolled_out(fleet, HOSTS[:4])
    assert done.result == "rolled-back"
    assert fleet.went_back == ["gpu-01"]


def test_three_canaries_that_can_not_be_deployed_end_it() -> None:
    fleet = RecordedFleet(HOSTS, dict.fromkeys(HOSTS, Ran("failed", "Check the settings with it")))
    done = rolled_out(fleet, HOSTS)
    assert fleet.deployed == HOSTS[:3]
    assert len(done.those("pending")) == 17
    assert "3 hosts in a row" in done.reason


def test_host_that_can_not_go_back_is_called_stuck() -> None:
    fleet = RecordedFleet(HOSTS, {"gpu-01": worker(active_state="failed", exit_status=1)})
    fleet.go_back = lambda host, reason: Ran(  # type: ignore[method-assign]
        "failed", "does not start again"
    )
    done = rolled_out(fleet, HOSTS)
    assert (done.result, done.hosts["gpu-01"].reason) == ("stuck", "does not start again")


def test_coordinator_comes_after_the_canary_but_first_where_it_carries_nothing() -> None:
    size = Size(2)
    pending = ["hub", "gpu-1", "gpu-2", "gpu-3"]
    assert next_batch(pending, [], ["hub"], [], size) == Batch("canary", ("gpu-1",))
    assert next_batch(pending, [], ["hub"], ["hub"], size) == Batch("coordinator", ("hub",))
    assert next_batch(["hub", "gpu-2", "gpu-3"], ["gpu-1"], ["hub"], [], size) == Batch(
        "coordinator", ("hub",)
    )
    assert next_batch(["gpu-2", "gpu-3"], ["gpu-1", "hub"], ["hub"], [], size) == Batch(
        "batch", ("gpu-2", "gpu-3")
    )
    assert next_batch(["hub"], [], ["hub"], [], size) == Batch("coordinator", ("hub",))
    assert next_batch([], ["gpu-1"], ["hub"], [], size) is None


@pytest.mark.parametrize(("text", "size"), [("3", 3), ("25%", 2), ("1%", 1), ("100%", 7)])
def test_size_of_a_batch(text: str, size: int) -> None:
    assert Size.parse(text).of(7) == size


@pytest.mark.parametrize("text", ["0", "-1", "101%", "0%", "many", "1.5", ""])
def test_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--batch: got"):
        Size.parse(text)


@pytest.mark.parametrize(
    ("before", "now", "health"),
    [
        ([], [worker()], "well"),
        ([], [worker(finished=[999.0])], "wait"),
        ([], [worker(active_state="activating")], "wait"),
        ([], [worker(active_state="activating", restarts=2, exit_status=1)], "bad-release"),
        ([], [worker(active_state="activating", restarts=2, exit_status=4)], "bad-host"),
        ([], [worker(active_state="activating", restarts=2)], "wait"),
        ([], [worker(active_state="activating", restarts=1, exit_status=1)], "wait"),
        ([], [worker(active_state="failed", exit_status=4)], "bad-host"),
        # It was restarted often before; the deploy did not touch it, or systemd counts from 0.
        ([worker(restarts=9)], [worker(restarts=9)], "well"),
        ([worker(restarts=9)], [worker(restarts=3, exit_status=1)], "bad-release"),
        ([], [worker(), worker(unit="hivewright-worker@1.service", finished=[])], "wait"),
        ([keeper(7)], [keeper(7)], "wait"),
        ([keeper(7)], [keeper(8)], "well"),
        ([keeper(7, expected=0)], [keeper(7)], "well"),
        ([], [keeper(None)], "well"),
        (
            [keeper(7)],
            [keeper(8) | {"status": None, "problem": "status.json can't be read"}],
            "wait",
        ),
        # Its settings are gone, or the deploy did not get so far: nothing is known of it.
        ([worker()], [], "wait"),
        # The coordinator's other services run, or do not.
        ([], [worker(unit="hivewright-account.service", finished=[])], "well"),
        (
            [],
            [worker(unit="hivewright-chain.service", active_state="inactive", finished=[])],
            "wait",
        ),
        # The reward is far below that of the rounds before: more rounds are waited for, up to a
        # point.
        ([paid([0.4, 0.5, 0.6])], [paid([], [0.3])], "well"),
        ([paid([0.4, 0.5, 0.6])], [paid([], [0.0])], "wait"),
        ([paid([0.4, 0.5, 0.6])], [paid([], [0.0] * 8)], "bad-release"),
        ([paid([0.4, 0.5, 0.6])], [paid([], [0.0] * 4 + [0.9] * 4)], "well"),
        ([paid([0.0, 0.0, 0.0])], [paid([], [0.0])], "well"),
        ([paid([0.9])], [paid([], [0.0])], "well"),
        ([paid([None, None, None])], [paid([], [None])], "well"),
        # Rewards were confirmed before, and are no more.
        ([paid([], confirmed=3)], [paid([], [0.5], confirmed=3)], "wait"),
        ([paid([], confirmed=3)], [paid([], [0.5], confirmed=4)], "well"),
        ([paid([], confirmed=0)], [paid([], [0.5], confirmed=0)], "well"),
    ],
)
def test_gate_wants_progress(
    before: list[dict[str, Any]], now: list[dict[str, Any]], health: str
) -> None:
    assert health_gate.judge(before, now, WANTED).health == health


def test_interrupted_deploy_leaves_its_hosts_pending(tmp_path: Path) -> None:
    fleet = RecordedFleet(HOSTS[:4])

    def deploy(host: str, commit: str) -> Ran:
        if host == "gpu-02":
            raise KeyboardInterrupt
        return RecordedFleet.deploy(fleet, host, commit)

    fleet.deploy = deploy  # type: ignore[method-assign]
    so_far = Report("inventory/x.py", {name: HostReport(NEW) for name in HOSTS[:4]})
    with pytest.raises(KeyboardInterrupt):
        rolled_out(fleet, HOSTS[:4], so_far)
    assert fleet.is_stopped
    assert so_far.hosts["gpu-02"].fate == "pending"
    assert rolled_out(RecordedFleet(HOSTS[:4]), HOSTS[:4], so_far).result == "done"


def test_resumed_rollout_that_fails_takes_back_what_it_touched_before(tmp_path: Path) -> None:
    names = HOSTS[:6]
    fleet = RecordedFleet(names, {"gpu-03": Ran("unreachable", "can't be reached")})
    first = rolled_out(fleet, names)
    assert first.result == "incomplete"
    first.hosts["gpu-03"].fate = "pending"
    fleet.troubles = {"gpu-03": worker(active_state="failed", exit_status=1)}
    done = rolled_out(fleet, names, first)
    assert done.result == "rolled-back"
    assert sorted(fleet.went_back) == names


def test_host_that_another_run_has_deployed_since_is_not_taken_back() -> None:
    names = HOSTS[:3]
    fleet = RecordedFleet(names, {"gpu-03": Ran("unreachable", "can't be reached")})
    first = rolled_out(fleet, names)
    first.hosts["gpu-03"].fate = "pending"
    fleet.state["gpu-01"] = {"commit": "c" * 40, "deployed": "c" * 40, "previous": NEW}
    fleet.troubles = {"gpu-03": worker(active_state="failed", exit_status=1)}
    done = rolled_out(fleet, names, first)
    assert done.result == "stuck"
    assert "another run" in done.hosts["gpu-01"].reason
    assert sorted(fleet.went_back) == ["gpu-02", "gpu-03"]


def test_going_back_goes_on_when_it_was_interrupted_or_could_not_reach_a_host(
    tmp_path: Path,
) -> None:
    names = HOSTS[:5]
    fleet = RecordedFleet(names, {"gpu-03": worker(active_state="failed", exit_status=1)})
    gone = RecordedFleet(names, fleet.troubles)
    gone.go_back = lambda host, reason: Ran(  # type: ignore[method-assign]
        "unreachable", "can't be reached"
    )
    stuck = rolled_out(gone, names)
    assert stuck.result == "stuck"
    file = tmp_path / "report.json"
    stuck.write(file)
    resumed = _resumed(file, INVENTORY, [{"name": name} for name in names])
    fleet.state = gone.state
    done = rolled_out(fleet, names, resumed)
    assert done.result == "rolled-back"
    assert fleet.deployed == []
    assert fleet.went_back == [name for name in names if done.hosts[name].fate == "rolled-back"]


def test_host_that_dies_in_the_gate_holds_nobody_up_for_long() -> None:
    fleet = RecordedFleet(HOSTS[:3], {"gpu-02": "gone"})
    patient = Rules(
        Size(25, True), WANTED, gate_seconds=60, gone_seconds=0.05, look_every_seconds=0.01
    )
    so_far = Report("inventory/x.py", {name: HostReport(NEW) for name in HOSTS[:3]})
    began = time.monotonic()
    Rollout(fleet, patient, [], so_far, lambda _: None, lambda _: None).run()
    assert time.monotonic() - began < 10
    assert so_far.those("lost") == ["gpu-02"]
    assert so_far.those("done") == ["gpu-01", "gpu-03"]


def test_host_that_says_nothing_once_is_asked_again_before_it_is_left_behind() -> None:
    fleet = RecordedFleet(HOSTS[:3])
    looks = []

    def look(hosts: Sequence[str]) -> dict[str, Seen]:
        looks.append(list(hosts))
        return {} if len(looks) == 1 else RecordedFleet.look(fleet, hosts)

    fleet.look = look  # type: ignore[method-assign]
    assert rolled_out(fleet, HOSTS[:3]).result == "done"
    assert looks[:2] == [HOSTS[:3], HOSTS[:3]]


def test_report_reads_back_and_resumes_only_what_is_left(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    written = Report(
        "inventory/x.py",
        {"a": HostReport(NEW, OLD, "done"), "b": HostReport(NEW, OLD, "lost", "gone", 1)},
    )
    written.result = "incomplete"
    written.write(file)
    assert report.read(file) == written
    resumed = _resumed(file, INVENTORY, [{"name": "a"}, {"name": "b"}])
    assert resumed.those("pending") == ["b"]
    with pytest.raises(SettingsError, match=r"expected a rollout of .*inventory/y\.py"):
        _resumed(file, INVENTORY.replace("x", "y"), [])
    with pytest.raises(
        SettingsError, match=r"none of its hosts is in .*inventory/x\.py; start again"
    ):
        _resumed(file, INVENTORY, [{"name": "c"}])
    written.result, written.reason = "rolled-back", "no rounds"
    written.write(file)
    with pytest.raises(SettingsError, match=r"rolled back \(no rounds\)"):
        _resumed(file, INVENTORY, [])
    with pytest.raises(SettingsError, match="no rollout to resume"):
        _resumed(tmp_path / "none.json", INVENTORY, [])


@pytest.mark.parametrize("host", ["gpu-01.fra1.compute.example.org", "g" * 63])
def test_table_is_readable_at_80_columns_whatever_the_hosts_are_called(host: str) -> None:
    reason = "worker@0 ended with code 4, 3 restarts: the disk is full"
    ended = Report(
        "inventory/x.py", {host: HostReport(NEW, OLD, "rolled-back", reason, 1, 3, 1234.0)}
    )
    console = Console(width=80)
    with console.capture() as capture:
        console.print(report.table(ended))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    first = lines[1]
    assert "rolled-back" in first
    assert OLD[:7] in first
    starts = [lines[0].index(column) for column in ("host", "batch", "reason")]
    assert "".join(line[: starts[1]].strip() for line in lines[1:]) == host
    assert " ".join(line[starts[2] :].strip() for line in lines[1:]).split() == reason.split()


def test_gate_says_what_it_waits_for_and_how_long(tmp_path: Path) -> None:
    fleet = RecordedFleet(HOSTS[:1], {"gpu-01": worker(finished=[])})
    said: list[str] = []
    so_far = Report("inventory/x.py", {HOSTS[0]: HostReport(NEW)})
    Rollout(fleet, RULES, [], so_far, lambda _: None, said.append).run()
    (wait,) = [line for line in said if ": waiting (" in line]
    assert (
        "gpu-01: waiting (0 of at most 0 s): worker@0 has finished 0 of 1 rounds, it is"
        " training" in wait
    )


def test_words_of_an_error_that_nobody_foresaw_are_the_reason() -> None:
    ill = worker(active_state="failed", exit_status=1, last_words="RuntimeError: boom")
    done = rolled_out(RecordedFleet(HOSTS[:2], {"gpu-01": ill}), HOSTS[:2])
    assert "worker@0 ended with code 1, 0 restarts: RuntimeError: boom" in done.reason


def test_host_with_an_ill_gpu_is_to_blame_and_not_the_release() -> None:
    ill = {"check": "gpu", "severity": "severe", "text": "it has fallen off the bus; replace it"}
    hot = {"check": "gpu", "severity": "warning", "text": "throttled; cool it"}
    for warnings, expected in ((ill,), "bad-host"), ((hot,), "well"):
        now = worker(status={"activity": "training", "warnings": [*warnings]})
        verdict = health_gate.judge([], [now], health_gate.Wanted())
        assert verdict.health == expected
        assert ("fallen off the bus" in verdict.reason) == (expected == "bad-host")
    for check in health_gate.HOST_CHECKS:
        now = worker(status={"activity": "training", "warnings": [ill | {"check": check}]})
        assert check in health.BY_NAME
        assert health_gate.judge([], [now], health_gate.Wanted()).health == "bad-host"
    ended = worker(active_state="failed", exit_status=11, last_words="must be reset")
    assert health_gate.judge([], [ended], health_gate.Wanted()).health == "bad-host"


def test_rollout_is_a_page_with_each_host_and_what_became_of_it() -> None:
    hosts = {
        "gpu-1": HostReport(NEW, OLD, "done", seconds=61.4, num_changes=7),
        "gpu-2": HostReport(NEW, OLD, "lost", "<b>it has fallen off the bus</b>"),
    }
    page = report.page(Report(INVENTORY, hosts, 0.0, 90.0, "incomplete"))
    assert "1 done, 1 lost" in page
    assert "1970-01-01 00:01:30 UTC" in page
    assert "&lt;b&gt;it has fallen off the bus" in page
    assert f"{OLD[:7]} &gt; {NEW[:7]}" in page
