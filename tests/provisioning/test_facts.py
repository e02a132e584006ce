"""What the own facts make of a host's answers."""

import subprocess
from pathlib import Path

from deploys.facts import (
    ANVILS,
    ENVIRONMENTS,
    ChosenModels,
    ConfiguredSlots,
    Deploys,
    Identities,
    InstalledPackages,
    InstalledReleases,
    PastDeploys,
    Releases,
    Service,
    ServiceState,
    SystemdVersion,
    UserEntry,
)
from deploys.survey import Footprint, HostStates, Logs, NodeReports, Sealed


def test_releases_and_what_they_use() -> None:
    found = Releases().process(
        [
            "current bbb",
            "release bbb /opt/hivewright/environments/e1 /opt/hivewright/anvil/a1",
            "release aaa /opt/hivewright/environments/e1",
            "release ccc",
            "folder /opt/hivewright/environments/e1",
            "folder /opt/hivewright/environments/e0",
        ]
    )
    assert found.current == "bbb"
    assert list(found.parts) == ["bbb", "aaa", "ccc"]
    assert found.has("bbb", ANVILS)
    assert not found.has("aaa", ANVILS)
    assert not found.has("ccc", ENVIRONMENTS)
    assert found.folders == {ENVIRONMENTS / "e0", ENVIRONMENTS / "e1"}


def test_bare_host_has_no_releases() -> None:
    assert Releases().process(["current"]) == InstalledReleases()


def test_identities_by_slot() -> None:
    lines = [
        '/var/lib/hivewright/worker-0/enrolment.json {"peer_id": "Qm0"}',
        '/x/worker-12/enrolment.json {"peer_id": "Qm1"}',
    ]
    assert Identities().process(lines) == {0: "Qm0", 12: "Qm1"}


def test_slots_whose_model_the_machine_chose() -> None:
    lines = ["/var/lib/hivewright/worker-10/model.json", "/var/lib/hivewright/worker-2/model.json"]
    assert ChosenModels().process(lines) == [2, 10]
    assert ChosenModels().process([]) == []


def test_service_state() -> None:
    lines = ["ActiveState=active", "UnitFileState=enabled", "NeedDaemonReload=no", "Digest=abc"]
    assert Service().process(lines) == ServiceState(is_active=True, is_enabled=True, digest="abc")
    unknown = ["ActiveState=inactive", "UnitFileState=", "NeedDaemonReload=no", "Digest="]
    assert Service().process(unknown) == ServiceState()


def test_node_reports_with_and_without_a_status() -> None:
    lines = [
        "unit=hivewright-worker@0.service",
        "NRestarts=2",
        "ExecMainStatus=0",
        "ActiveState=active",
        "ActiveEnterTimestamp=Mon 2026-11-23 14:25:21 UTC",
        "started_at=1795443921",
        "finished=1795443930.5 1795443940.25",
        'status={"round": 3, "state": "a=b"}',
        "unit=hivewright-worker@1.service",
        "ActiveState=failed",
        "ExecMainStatus=4",
        "finished=",
        "status=",
        "end",
    ]
    first, second = NodeReports().process(lines)
    assert first == {
        "unit": "hivewright-worker@0.service",
        "active_state": "active",
        "status": {"round": 3, "state": "a=b"},
        "started_at": 1795443921.0,
        "restarts": 2,
        "exit_status": 0,
        "finished": (1795443930.5, 1795443940.25),
    }
    assert (second["active_state"], second["status"], second["exit_status"]) == ("failed", None, 4)


def test_host_state_with_gpus_and_what_computes_on_them() -> None:
    lines = [
        "commit=abc",
        "deployed=123",
        "previous=",
        "disk= 12000 50000",
        'tailscale={"BackendState": "NeedsLogin"}',
        "gpu=0, GPU-aa, 1024, 81559, 37",
        "gpu=1, GPU-bb, [N/A], 81559, [N/A]",
        "process=GPU-aa, 4711",
        "end",
    ]
    found = HostStates().process(lines)
    assert (found["commit"], found["deployed"], found["previous"]) == ("abc", "123", None)
    assert (found["disk_free_mb"], found["disk_total_mb"], found["tailscale"]) == (12000, 50000, "NeedsLogin")
    assert found["gpus"][0] == {"index": 0, "memory_used": 1024, "memory_total": 81559, "use": 37, "pids": (4711,)}
    assert found["gpus"][1]["use"] == 0


def test_host_that_did_not_answer_to_the_end_is_not_taken_for_a_bare_one() -> None:
    for fact in (NodeReports(), HostStates(), Logs(), Footprint(), Sealed()):
        assert fact.default() is None
        assert fact.process(["unit=hivewright-worker@0.service"]) is None
    assert NodeReports().process(["end"]) == []
    assert Footprint().process(["end"]) == []


def test_user_and_packages_as_the_system_has_them() -> None:
    line = "hivewright:x:998:998::/var/lib/hivewright:/usr/sbin/nologin"
    assert UserEntry().process([line]) == ("/var/lib/hivewright", "/usr/sbin/nologin")
    assert InstalledPackages().process(["ii  git", "rc  nano", "un  screen", "hi  gcc"]) == {"git", "gcc"}


def test_last_and_previous_deploy() -> None:
    assert PastDeploys().process(["last", "previous"]) == Deploys()
    assert PastDeploys().process(["last 12ab", "previous 34cd"]) == Deploys("12ab", "34cd")


def test_systemd_version() -> None:
    assert SystemdVersion().process(["systemd 252 (252.39-1~deb12u2)"]) == 252


def test_commands_are_quiet_and_succeed_on_a_machine_without_any_of_it(tmp_path: Path) -> None:
    for command in (
        Releases().command(),
        Identities().command(),
        ChosenModels().command(),
        ConfiguredSlots().command(),
        Service().command(unit="hivewright-no-such@0.service"),
        NodeReports().command(),
        HostStates().command(),
        Logs().command(lines=3, unit="hivewright-no-such.service"),
        Footprint().command(),
        PastDeploys().command(),
        UserEntry().command(user="nosuchuser"),
        InstalledPackages().command(names=["no-such-package"]),
        SystemdVersion().command(),
    ):
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, timeout=30, check=False, cwd=tmp_path
        )
        assert (done.returncode, done.stderr) == (0, ""), command
