"""`hivewright rollout` and `fleet` on real hosts: h1 is the coordinator, h2 and h3 train.

The tests run in this order on one fleet; each leaves it training.
"""

import io
import json
import subprocess
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from deploys.fleet import backup_file
from lab.lab import Lab
from lab.lab_host import CHECKOUT, Host
from lab.process import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(900)]

INVENTORY = CHECKOUT / "inventory/lab.py"
WORKER = "hivewright-worker@0.service"


def hivewright(
    lab: Lab, *arguments: str | Path, timeout: float = 800
) -> subprocess.CompletedProcess[str]:
    return lab.operator("python", "-m", "worker", *arguments, timeout=timeout, check=False)


def rollout(
    lab: Lab, inventory: Path, output: Path, *more: str, gate_seconds: int = 150
) -> tuple[int, dict[str, Any], str]:
    """Return exit code, report and output."""
    limit = ("--gate-seconds", str(gate_seconds))
    done = hivewright(lab, "rollout", inventory, *limit, "--output", output, *more)
    return (
        done.returncode,
        json.loads((output / "report.json").read_text()),
        done.stdout + done.stderr,
    )


def inventory_of(folder: Path, branch: str) -> Path:
    """Return the lab's inventory with another branch of the lab's repository."""
    file = folder / "lab.py"
    file.write_text(INVENTORY.read_text() + f'\nall[1]["release_ref"] = "{branch}"\n')
    return file


def commit_of(host: Host) -> str:
    return host.ssh("basename $(readlink /opt/hivewright/current)").stdout.strip()


def peer_id(host: Host) -> str:
    enrolment = host.ssh("cat /var/lib/hivewright/worker-0/enrolment.json").stdout
    return str(json.loads(enrolment)["peer_id"])


def main_pid(host: Host) -> int:
    return int(host.ssh(f"systemctl show --property=MainPID --value {WORKER}").stdout)


def rounds(host: Host) -> list[int]:
    """Return the rounds that the host has trained, without their further parts."""
    text = (host.root / "var/lib/hivewright/worker-0/rounds.jsonl").read_text()
    lines = map(json.loads, text.splitlines())
    return [line["round"] for line in lines if line["part"] == 0]


def wait_for_rounds(*hosts: Host, timeout: float = 120) -> None:
    before = {host.name: len(rounds(host)) for host in hosts}
    for host in hosts:
        wait_until(
            lambda h=host: len(rounds(h)) > before[h.name] + 1, timeout, f"{host.name} trains", 0.5
        )


def test_rollout_brings_a_new_commit_to_every_host_one_first(fleet: Lab, tmp_path: Path) -> None:
    hosts = [fleet.host(number) for number in (1, 2, 3)]
    identities = [peer_id(host) for host in hosts[1:]]
    new = fleet.branch("lab", "docs/next.md", "A page of the next release.\n")
    code, report, said = rollout(fleet, INVENTORY, tmp_path / "out")
    assert code == 0, said
    assert report["result"] == "done"
    assert {host["fate"] for host in report["hosts"].values()} == {"done"}
    assert report["hosts"]["h2"]["batch"] < report["hosts"]["h3"]["batch"]
    for host in hosts:
        assert commit_of(host) == new
        links = host.ssh("cd /opt/hivewright/releases && readlink */environment").stdout.split()
        assert len(links) == 2
        assert len(set(links)) == 1, "a new release with the same lock file has its environment"
    assert [peer_id(host) for host in hosts[1:]] == identities
    wait_for_rounds(*hosts[1:])


def test_services_without_a_gpu_are_confined_and_log_to_files(fleet: Lab) -> None:
    of_hub = [(unit, 1) for unit in ("account", "dashboard", "chain", "keeper", "bootnode")]
    for unit, number in (*of_hub, ("worker@0", 2)):
        shown = fleet.host(number).ssh(
            f"systemd-analyze security --no-pager hivewright-{unit}.service | tail -n 1"
        )
        assert float(shown.stdout.split(": ")[1].split()[0]) <= 2.0, shown.stdout
    log = fleet.host(2).ssh("cat /var/log/hivewright/worker-0/hivewright-worker@0.log").stdout
    assert "round finished" in log
    refused = fleet.host(2).ssh(
        "runuser -u hivewright -- cat /etc/hivewright/enrolment.token", check=False
    )
    assert refused.returncode != 0


def test_release_that_does_not_train_meets_one_host_and_goes_back(
    fleet: Lab, tmp_path: Path
) -> None:
    h2, h3 = fleet.host(2), fleet.host(3)
    good, others = commit_of(h2), (main_pid(h3), commit_of(fleet.host(1)))
    # Only the worker itself imports this module, so the deploy's checks of the release pass.
    text = (CHECKOUT / "worker/node.py").read_text() + 'raise RuntimeError("it is broken")\n'
    bad = fleet.branch("broken", "worker/node.py", text)
    inventory = inventory_of(tmp_path, "broken")
    # It will never train, so the gate need not wait for long.
    code, report, said = rollout(fleet, inventory, tmp_path / "out", gate_seconds=20)
    assert code == 10, said
    assert report["result"] == "rolled-back"
    assert {name: host["fate"] for name, host in report["hosts"].items()} == {
        "h1": "pending",
        "h2": "rolled-back",
        "h3": "pending",
    }
    assert report["hosts"]["h2"]["commit"] == bad
    assert commit_of(h2) == good
    note = json.loads(h2.ssh("cat /opt/hivewright/rolled-back.json").stdout)
    assert (note["release"], report["reason"] in note["reason"]) == (bad, True)
    assert note["reason"].startswith("a rollout's gate refused it: h2: worker@0 ")
    assert (main_pid(h3), commit_of(fleet.host(1))) == others
    wait_for_rounds(h2, h3)


@pytest.mark.nightly
def test_host_that_is_gone_holds_nobody_up_and_resume_touches_only_it(
    fleet: Lab, tmp_path: Path
) -> None:
    h2, h3 = fleet.host(2), fleet.host(3)
    new = fleet.branch("next", "docs/next.md", "The next release.\n")
    inventory, output = inventory_of(tmp_path, "next"), tmp_path / "out"
    h3.pull_plug()
    try:
        code, report, said = rollout(fleet, inventory, output)
    finally:
        fleet.start(3)
    assert code == 1, said
    assert {name: host["fate"] for name, host in report["hosts"].items()} == {
        "h1": "done",
        "h2": "done",
        "h3": "unreachable",
    }
    assert commit_of(h2) == new
    pid = main_pid(h2)
    code, report, said = rollout(fleet, inventory, output, "--resume")
    assert code == 0, said
    assert report["result"] == "done"
    assert commit_of(h3) == new
    assert main_pid(h2) == pid


@pytest.mark.nightly
def test_day_two_commands(fleet: Lab, tmp_path: Path) -> None:
    h2 = fleet.host(2)
    wait_until(
        lambda: hivewright(fleet, "fleet", "status", INVENTORY).returncode == 0,
        60,
        "all is well",
        3,
    )
    table = hivewright(fleet, "fleet", "status", INVENTORY).stdout
    assert "h2/0" in table
    assert "h1/keeper" in table
    done = hivewright(fleet, "fleet", "logs", INVENTORY, "--limit", "h2", "--lines", "5")
    assert done.returncode == 0, done.stderr
    assert "hivewright-worker@0" in done.stdout
    assert hivewright(fleet, "fleet", "stop", INVENTORY, "--limit", "h2").returncode == 0
    assert h2.ssh(f"systemctl is-active {WORKER}", check=False).stdout.strip() == "inactive"

    passphrase = tmp_path / "passphrase"
    passphrase.write_text("correct horse battery\n")
    kept = ("--archive", tmp_path / "fleet.backup", "--passphrase-file", passphrase)
    done = hivewright(fleet, "fleet", "backup", INVENTORY, *kept)
    assert done.returncode == 0, done.stderr
    key = (h2.root / "var/lib/hivewright/worker-0/swarm.pem").read_bytes()
    hosts: dict[str, bytes] = defaultdict(bytes)
    for name, piece in backup_file.pieces(tmp_path / "fleet.backup", "correct horse battery"):
        hosts[name] += piece
    with tarfile.open(fileobj=io.BytesIO(hosts["h2"])) as tar:
        stored = tar.extractfile("worker-0/swarm.pem")
        assert stored is not None
        assert stored.read() == key
    with tarfile.open(fileobj=io.BytesIO(hosts["h1"])) as tar:
        assert {"keeper/owner.key", "chain/state.json"} <= set(tar.getnames())

    done = hivewright(
        fleet, "fleet", "uninstall", INVENTORY, "--limit", "h2", "--identities", "--yes"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (h2.root / "opt/hivewright").exists()
    assert not (h2.root / "var/lib/hivewright").exists()
    done = hivewright(fleet, "fleet", "restore", INVENTORY, *kept, "--to", "h2")
    assert done.returncode == 0, done.stdout + done.stderr
    # Not deployed again here: the environment is gone too, and a lab host has no package index to
    # build another from.
    assert (h2.root / "var/lib/hivewright/worker-0/swarm.pem").read_bytes() == key
