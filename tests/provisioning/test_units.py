"""Units and settings files as they come to lie on a host."""

import configparser
from pathlib import Path
from typing import Any

import pytest

from deploys import coordinator, hosts, units, worker
from deploys.hosts import HostEntry
from worker import settings

DEBIAN_12, DEBIAN_13 = 252, 257
UNITS = [worker.UNIT, worker.ENROL_UNIT, *(f"hivewright-{service}.service" for service in coordinator.SERVICES)]


def parse(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


@pytest.mark.parametrize("unit", UNITS)
def test_every_service_is_unprivileged_and_confined(unit: str) -> None:
    service = parse(units.render(unit, DEBIAN_12, 900))["Service"]
    expected = {
        "User": "hivewright",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "CapabilityBoundingSet": "",
        "UMask": "0077",
        "RestartPreventExitStatus": "2 3 5",
        "Restart": "on-failure",
        "KillMode": "mixed",
    }
    if unit == worker.ENROL_UNIT:
        expected = {key: expected[key] for key in expected if not key.startswith(("Restart", "Kill"))}
    assert {key: service[key] for key in expected} == expected
    assert service["StateDirectory"].startswith("hivewright/")


@pytest.mark.parametrize("unit", UNITS)
def test_unit_reads_a_settings_file_that_the_deploy_writes(unit: str) -> None:
    command = parse(units.render(unit, DEBIAN_12, 900))["Service"]["ExecStart"].split()
    assert command[:3] == ["/opt/hivewright/current/environment/bin/python", "-m", "worker"]
    at = command.index("--settings")
    name = Path(command[at + 1]).name
    assert name in ("worker-%i.yaml", *(f"{role}.yaml" for role in hosts.COORDINATOR_ROLES))
    log = command[at + 2 :]
    is_service = unit not in (worker.ENROL_UNIT, "hivewright-contract.service")
    assert log == (["--log-file", "%L/hivewright/%N.log"] if is_service else [])


def test_only_those_who_need_the_enrolment_token_get_a_copy() -> None:
    for unit in UNITS:
        text = units.render(unit, DEBIAN_12, 900)
        needs_it = unit in (worker.ENROL_UNIT, "hivewright-account.service")
        assert ("LoadCredential=enrolment.token:/etc/hivewright/enrolment.token\n" in text) == needs_it
        assert "PrivateDevices=yes" in text or "DevicePolicy=closed" in text


def test_worker_is_watched() -> None:
    assert parse(units.render(worker.UNIT, DEBIAN_12, 77))["Service"]["WatchdogSec"] == "77"


def test_pauses_between_restarts_grow_where_systemd_can() -> None:
    new, old = (parse(units.render(worker.UNIT, version, 900)) for version in (DEBIAN_13, DEBIAN_12))
    assert new["Service"]["RestartSteps"] == "8"
    assert new["Unit"]["StartLimitIntervalSec"] == "0"
    assert "RestartSteps" not in old["Service"]
    assert old["Unit"]["StartLimitBurst"] == "60"


def test_settings_file_reads_back_to_the_same_settings(tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "slots": 1,
        "trainer_learning_rate": 1e-06,
        "chain_contract": "0x" + "00" * 20,
        "swarm_bootnodes": ["/ip4/192.0.2.1/tcp/1/p2p/x"],
    }
    slot = hosts.check([HostEntry("gpu-1", ("workers",), data)])["gpu-1"].slots[0]
    file = tmp_path / "worker-0.yaml"
    file.write_text(units.settings_text(slot.settings))
    assert settings.load(file) == slot.settings
    assert slot.settings.trainer.learning_rate == 1e-06


def test_digest_changes_with_each_part_and_with_where_parts_end() -> None:
    digests = {units.digest(*parts) for parts in (("a", "b"), ("ab", ""), ("", "ab"), ("b", "a"))}
    assert len(digests) == 4
