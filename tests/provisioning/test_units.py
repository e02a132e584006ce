"""Units and settings files as a deploy writes them."""

import base64
import configparser
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploys import paths, system, units, worker
from deploys.inventory import validation
from deploys.inventory.host_plan import HostEntry
from deploys.paths import CURRENT, MODELS
from deploys.services import (
    COORDINATOR_ROLES,
    COORDINATOR_SERVICES,
    COORDINATOR_UNITS,
    ENROL_UNIT,
    GPU_UNIT,
    WORKER_UNIT,
)
from worker import settings

DEBIAN_12, DEBIAN_13 = 252, 257
UNITS = [WORKER_UNIT, ENROL_UNIT, *COORDINATOR_UNITS]


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
        "RestartPreventExitStatus": "2 3 5 11",
        "Restart": "on-failure",
        "KillMode": "mixed",
    }
    if unit == ENROL_UNIT:
        expected = {
            key: expected[key] for key in expected if not key.startswith(("Restart", "Kill"))
        }
    assert {key: service[key] for key in expected} == expected
    assert service["StateDirectory"].startswith("hivewright/")


@pytest.mark.parametrize("unit", UNITS)
def test_unit_reads_a_settings_file_that_the_deploy_writes(unit: str) -> None:
    command = parse(units.render(unit, DEBIAN_12, 900))["Service"]["ExecStart"].split()
    assert command[:3] == ["/opt/hivewright/current/environment/bin/python", "-m", "worker"]
    at = command.index("--settings")
    name = Path(command[at + 1]).name
    assert name in ("worker-%i.yaml", *(f"{role}.yaml" for role in COORDINATOR_ROLES))
    log = command[at + 2 :]
    is_service = unit not in (ENROL_UNIT, "hivewright-contract.service")
    folder = parse(units.render(unit, DEBIAN_12, 900))["Service"]["LogsDirectory"]
    assert log == (["--log-file", f"%L/{folder}/%N.log"] if is_service else [])


@pytest.mark.parametrize("unit", UNITS)
def test_service_sees_no_folder_of_another_but_what_it_reads_there(unit: str) -> None:
    service = parse(units.render(unit, DEBIAN_12, 900))["Service"]
    own = service["StateDirectory"]
    assert service["TemporaryFileSystem"] == "%S/hivewright:ro %C/hivewright:ro %L/hivewright:ro"
    assert service["BindPaths"] == f"%S/{own} %C/{own} %L/{own}"
    assert {service[f"{kind}Directory"] for kind in ("Cache", "Logs")} == {own}
    record = next((record for record in COORDINATOR_SERVICES if record.unit == unit), None)
    for key, shown in (("BindReadOnlyPaths", "reads"), ("InaccessiblePaths", "hides")):
        listed = [f"-{path}" for path in getattr(record, shown, ())]
        assert service.get(key, "").split() == listed
    assert service["PrivateUsers"] == "yes"
    is_chain = unit == "hivewright-chain.service"
    assert service.get("PrivateNetwork") == ("yes" if is_chain else None)
    assert service.get("IPAddressDeny") == (None if is_chain else units.METADATA)
    assert service["LimitNOFILE"] == str(units.OPEN_FILES)


def test_folder_of_a_key_is_shown_to_nobody_but_its_owner() -> None:
    """Another service may read single files there; none of these is a key but the judge's own."""
    for unit in UNITS:
        service = parse(units.render(unit, DEBIAN_12, 900))["Service"]
        hidden = service.get("InaccessiblePaths", "").split()
        for shown in service.get("BindReadOnlyPaths", "").split():
            folder, _, below = shown.removeprefix(f"-{paths.STATE}/").partition("/")
            assert not folder.startswith(("worker", "account", "dashboard", "judge")), unit
            if folder == "keeper" and below == "audit":
                assert f"{shown}/auditor.pem" in hidden
            elif folder == "keeper":
                is_judge = unit == "hivewright-judge.service"
                assert below in ("deployment.json", *(("judge.key",) if is_judge else ()))


def test_only_those_who_need_the_enrolment_token_get_a_copy() -> None:
    for unit in UNITS:
        text = units.render(unit, DEBIAN_12, 900)
        needs_it = unit in (ENROL_UNIT, "hivewright-account.service")
        assert (
            "LoadCredential=enrolment.token:/etc/hivewright/enrolment.token\n" in text
        ) == needs_it
        assert "PrivateDevices=yes" in text or "DevicePolicy=closed" in text


def test_worker_is_watched() -> None:
    assert parse(units.render(WORKER_UNIT, DEBIAN_12, 77))["Service"]["WatchdogSec"] == "77"


def slept_before_a_start(
    folder: Path, num_restarts: int, entered: int = 0, left: int = 0, now: int = 0
) -> list[str]:
    """Run the unit's command before a start, with stand-ins for systemctl and sleep.

    Seconds since boot: when it last started, when it ended, and when this start began.
    """
    values = {
        "ActiveEnterTimestampMonotonic": entered * 10**6,
        "ActiveExitTimestampMonotonic": left * 10**6,
        "InactiveExitTimestampMonotonic": now * 10**6,
        "NRestarts": num_restarts,
    }
    cases = "".join(f"*{key}*) echo {value};; " for key, value in values.items())
    (folder / "systemctl").write_text(f'#!/bin/sh\ncase "$*" in {cases} *) echo "$1";; esac\n')
    (folder / "sleep").write_text('#!/bin/sh\necho "$1"\n')
    for program in ("systemctl", "sleep"):
        (folder / program).chmod(0o755)
    command = parse(units.render(WORKER_UNIT, DEBIAN_12, 900))["Service"]["ExecStartPre"]
    script = shlex.split(command.replace("$$", "$").replace("\\\n", ""))[2]
    own = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        ["sh", "-c", script], env=own, capture_output=True, text=True, timeout=10, check=True
    ).stdout.split()


def test_service_is_started_again_forever_with_growing_pauses(tmp_path: Path) -> None:
    service = parse(units.render(WORKER_UNIT, DEBIAN_12, 900))
    assert service["Unit"]["StartLimitIntervalSec"] == "0"
    slept = [slept_before_a_start(tmp_path, number) for number in (0, 1, 2, 3, 4, 5, 999)]
    assert slept == [["0"], ["15"], ["45"], ["105"], ["225"], ["225"], ["225"]]
    # Each within TimeoutStartSec, which the command of a start has for itself.
    timeouts = {
        parse(units.render(unit, DEBIAN_12, 900))["Service"]["TimeoutStartSec"]
        for unit in UNITS
        if unit != ENROL_UNIT
    }
    assert timeouts == {"300"}


def test_service_that_was_well_starts_at_once_and_its_count_begins_again(tmp_path: Path) -> None:
    assert slept_before_a_start(tmp_path, 8, entered=100, left=100 + 1800, now=1903) == [
        "reset-failed",
        "0",
    ]
    # It ran for too short a time; or that was long ago, and what failed since never came up.
    assert slept_before_a_start(tmp_path, 8, entered=100, left=100 + 1799, now=1902) == ["225"]
    assert slept_before_a_start(tmp_path, 8, entered=100, left=100 + 1800, now=2100) == ["225"]


def test_command_is_not_that_of_the_folder_where_somebody_stands(tmp_path: Path) -> None:
    current = tmp_path / "current"
    for folder, said in ((current, "ours"), (tmp_path / "evil", "theirs")):
        (folder / "worker").mkdir(parents=True)
        (folder / "worker/__main__.py").write_text(f"print({said!r})\n")
    (current / "environment/bin").mkdir(parents=True)
    (current / "environment/bin/python").symlink_to(sys.executable)
    command = system.WRAPPER.replace(str(CURRENT), str(current)).splitlines()[-1]
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path / "evil",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "ours\n"


def test_drop_in_of_somebody_else_stays_when_ours_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that gives a slot the password of its wallet."""
    monkeypatch.setattr(units, "UNITS", tmp_path)
    folders = [tmp_path / f"hivewright-worker@{number}.service.d" for number in (0, 1)]
    for folder in folders:
        folder.mkdir()
        (folder / units.DROP_IN).touch()
    theirs = folders[0] / "wallet.conf"
    theirs.touch()
    for folder in folders:
        subprocess.run(["sh", "-euc", units.remove_drop_in(folder.stem)], timeout=10, check=True)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [theirs]
    assert not folders[1].exists()


def test_uninstall_takes_our_units_and_drop_ins_and_no_others(tmp_path: Path) -> None:
    ours = (
        "hivewright-worker@.service",
        "hivewright-chain.service",
        f"hivewright-worker@0.service.d/{units.DROP_IN}",
    )
    theirs = (
        "hivewright-worker@0.service.d/wallet.conf",
        "ssh.service",
        "ssh.service.d/hivewright.conf",
    )
    for name in (*ours, *theirs, f"hivewright-worker@1.service.d/{units.DROP_IN}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    script = units.REMOVE_OURS.replace(str(paths.UNITS), str(tmp_path))
    subprocess.run(["sh", "-euc", script], timeout=10, check=True)
    assert {
        str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()
    } == set(theirs)
    assert not (tmp_path / "hivewright-worker@1.service.d").exists()


def test_doctor_looks_within_the_limits_of_the_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for systemd-run prints its arguments."""
    monkeypatch.setattr(paths, "UNITS", tmp_path)
    data = {"slots": 1, "swarm_enabled": False, "slot_memory_gb": 4.0, "slot_cpus": 2.0}
    (slot,) = validation.check([HostEntry("gpu-1", ("workers",), data)])["gpu-1"].slots
    folder = tmp_path / f"{slot.unit}.d"
    folder.mkdir()
    (folder / units.DROP_IN).write_text(slot.unit_settings())
    (folder / "proxy.conf").write_text(
        '[Service]\nEnvironment="HTTPS_PROXY=http://p:1" "NO_PROXY=a b"\nNice=5\n'
    )
    (tmp_path / "systemd-run").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 4\n')
    (tmp_path / "systemd-run").chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = worker.examine_script(slot)
    done = subprocess.run(
        ["sh", "-euc", script], env=own, capture_output=True, text=True, timeout=10, check=False
    )
    assert done.returncode == 4
    said = done.stdout.splitlines()
    properties = [
        "MemoryMax=4000000000",
        "CPUQuota=200%",
        'Environment="HTTPS_PROXY=http://p:1" "NO_PROXY=a b"',
    ]
    walls = [
        (
            "TemporaryFileSystem=/var/lib/hivewright:ro /var/cache/hivewright:ro"
            " /var/log/hivewright:ro"
        ),
        "BindPaths=/var/lib/hivewright/worker-0 /var/cache/hivewright/worker-0",
        "PrivateUsers=yes",
    ]
    for each in (
        "User=hivewright",
        "Environment=HOME=/var/cache/hivewright/worker-0",
        *walls,
        *properties,
    ):
        assert f"--property={each}" in said
    assert "--property=Nice=5" not in said
    assert said[-3:] == ["doctor", "--settings", "/etc/hivewright/worker-0.yaml"]


def test_model_is_fetched_by_somebody_who_sees_nothing_of_the_slots_but_which_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "UNITS", tmp_path)
    data = {"slots": 2, "swarm_enabled": False, "model_name": "auto"}
    slots = validation.check([HostEntry("gpu-1", ("workers",), data)])["gpu-1"].slots
    for slot in slots:
        assert slot.settings.model.shared_dir == MODELS
        # In addition to the slot's own folders; without the "-" a unit would not start on a host
        # of another release, which has no such folder.
        assert f"BindReadOnlyPaths=-{MODELS}" in slot.unit_settings().splitlines()
        assert f"BindPaths={MODELS}" not in slot.unit_settings()
    (tmp_path / "systemd-run").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "systemd-run").chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-euc", worker.fetch_script(slots[1])],
        env=own,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    said = done.stdout.splitlines()
    hidden = ("/var/lib/hivewright:ro", "/var/cache/hivewright:ro", "/var/log/hivewright:ro")
    for each in (
        "User=hivewright",
        "Environment=HOME=/tmp",
        "CacheDirectory=hivewright/models",
        f"BindPaths={MODELS}",
        f"TemporaryFileSystem={' '.join(hidden)}",
        "BindReadOnlyPaths=-/var/lib/hivewright/worker-1/model.json",
    ):
        assert f"--property={each}" in said
    assert said[-3:] == ["fetch", "--settings", "/etc/hivewright/worker-1.yaml"]


def test_token_for_the_model_goes_to_the_unit_that_fetches_and_nothing_of_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "UNITS", tmp_path)
    data = {"slots": 1, "swarm_enabled": False, "model_name": "owner/gated"}
    data["model_token_file"] = str(tmp_path / "token")
    (tmp_path / "token").write_text("hf_example\n")
    slot = validation.check([HostEntry("gpu-1", ("workers",), data)])["gpu-1"].slots[0]
    script = worker.fetch_script(slot)
    credential = re.search(r"LoadCredential=model.token:(\S+?)'? ", script)
    assert credential is not None
    script = script.replace(credential[1], str(tmp_path / "credential"))
    (tmp_path / "systemd-run").write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@"; stat --format=%a {tmp_path}/credential; cat'
        f" {tmp_path}/credential\n"
    )
    (tmp_path / "systemd-run").chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    token = base64.b64encode(b"hf_example\n").decode()
    done = subprocess.run(
        ["sh", "-euc", script],
        env=own,
        input=token,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    said = done.stdout.splitlines()
    assert said[-2:] == ["600", "hf_example"]
    assert said[-5:-3] == ["/bin/sh", "-c"]
    assert said[-3].startswith(
        "exec /opt/hivewright/current/environment/bin/python -B -m worker fetch --settings "
    )
    assert said[-3].endswith('worker-0.yaml --token-file "$CREDENTIALS_DIRECTORY/model.token"')
    assert not (tmp_path / "credential").exists()
    assert "hf_example" not in script
    assert "model.token" not in worker.examine_script(slot)


@pytest.mark.parametrize("name", [None, "hivewright/tiny", "/srv/model", "./model", "~/model"])
def test_slot_whose_model_is_no_download_has_no_part_in_those_that_are(name: str | None) -> None:
    data = {"slots": 1, "swarm_enabled": False} | ({"model_name": name} if name else {})
    (slot,) = validation.check([HostEntry("gpu-1", ("workers",), data)])["gpu-1"].slots
    assert (slot.settings.model.shared_dir, slot.unit_settings()) == (None, "")


def test_settings_file_reads_back_to_the_same_settings(tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "slots": 1,
        "trainer_learning_rate": 1e-06,
        "chain_contract": "0x" + "00" * 20,
        "swarm_bootnodes": [
            "/ip4/192.0.2.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
        ],
    }
    slot = validation.check([HostEntry("gpu-1", ("workers",), data)])["gpu-1"].slots[0]
    file = tmp_path / "worker-0.yaml"
    file.write_text(units.settings_text(slot.settings))
    assert settings.load(file) == slot.settings
    assert slot.settings.trainer.learning_rate == 1e-06


def test_digest_changes_with_each_part_and_with_where_parts_end() -> None:
    digests = {units.digest(*parts) for parts in (("a", "b"), ("ab", ""), ("", "ab"), ("b", "a"))}
    assert len(digests) == 4


def test_worker_s_unit_writes_down_that_the_kernel_ended_it_for_its_memory() -> None:
    stop = parse(units.render(WORKER_UNIT, DEBIAN_12, 900))["Service"]["ExecStopPost"]
    assert stop.endswith(
        "'test \"$$SERVICE_RESULT\" != oom-kill || touch %S/hivewright/worker-%i/memory-killed'"
    )


def test_device_files_of_the_driver_are_made_before_workers_and_outside_their_walls() -> None:
    for unit in (WORKER_UNIT, ENROL_UNIT):
        section = parse(units.render(unit, DEBIAN_12, 900))["Unit"]
        assert GPU_UNIT in section["After"].split()
        assert GPU_UNIT in section["Wants"].split()
    text = units.render(GPU_UNIT, DEBIAN_12, 900)
    own = parse(text)
    assert own["Unit"]["ConditionPathExists"] == "!/dev/nvidia-uvm"
    assert own["Service"]["ExecStart"] == "/bin/sh -c 'exec nvidia-modprobe -u -c 0'"
    assert not [
        key for key in own["Service"] if key.startswith(("Device", "User", "Capab", "Private"))
    ]
