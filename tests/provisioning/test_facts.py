"""What the own facts make of a host's answers."""

import subprocess
from pathlib import Path

from deploys.facts import (
    ANVILS,
    ENVIRONMENTS,
    ChosenModels,
    ConfiguredSlots,
    Identities,
    InstalledReleases,
    NodeReports,
    Releases,
    Service,
    ServiceState,
    SystemdVersion,
)


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
    lines = ['hivewright-worker@0.service active {"round": 3}', "hivewright-worker@1.service failed "]
    assert NodeReports().process(lines) == [
        {"unit": "hivewright-worker@0.service", "active_state": "active", "status": {"round": 3}},
        {"unit": "hivewright-worker@1.service", "active_state": "failed", "status": None},
    ]


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
        SystemdVersion().command(),
    ):
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, timeout=30, check=False, cwd=tmp_path
        )
        assert (done.returncode, done.stderr) == (0, ""), command
