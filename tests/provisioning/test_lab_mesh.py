"""A WireGuard mesh of real hosts with Debian's wireguard-go: the kernel here has no WireGuard."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deploys import mesh
from lab.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.nightly, pytest.mark.timeout(600)]

ADDRESSES = {"h2": "10.86.0.2", "h3": "10.86.0.3", "h4": "10.86.0.4"}
DEPLOY = "tests/provisioning/wireguard_deploy.py"


class Fleet:
    """Three hosts of the lab with their own inventory."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.folder = folder

    def deploy(self, *limits: str, **own: dict[str, Any]) -> tuple[list[str], str]:
        """Deploy with these changes; return the operations with changes, and the output."""
        fleet = []
        for name, address in ADDRESSES.items():
            data = {
                "ssh_hostname": f"10.88.0.1{name[1]}",
                "wireguard_address": address,
                "wireguard": True,
            }
            fleet.append((name, data | own.get(name, {})))
        text = "from lab.access import operator_access\n"
        text += (
            f"workers = {fleet!r}\nall = ({list(ADDRESSES)!r}, {{**operator_access(), 'slots': 1,"
        )
        text += f" 'swarm_enabled': False, 'secrets_dir': {str(self.folder / 'secrets')!r}}})\n"
        inventory = self.folder / "mesh.py"
        inventory.write_text(text)
        limited = [word for limit in limits for word in ("--limit", limit)]
        done = self.lab.operator(
            "pyinfra",
            "-y",
            "-vvv",
            "--diff",
            "--json",
            *limited,
            inventory,
            DEPLOY,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        operations = json.loads(done.stdout)["results"]["operations"]
        return [each["name"] for each in operations if each["success"]], done.stdout + done.stderr

    def ssh(self, name: str, script: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.lab.host(int(name[1])).ssh(script, check=check)

    def reaches(self, source: str, target: str) -> bool:
        reach = f"import socket; socket.create_connection(('{ADDRESSES[target]}', 22), 5)"
        return self.ssh(source, f'python3 -c "{reach}"', check=False).returncode == 0


@pytest.fixture(scope="module")
def fleet(bare_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(bare_lab, tmp_path_factory.mktemp("mesh"))


def test_hosts_reach_each_other_and_keys_stay_where_they_were_made(fleet: Fleet) -> None:
    _, said = fleet.deploy()
    assert fleet.reaches("h2", "h3")
    assert fleet.reaches("h4", "h2")
    record = json.loads((fleet.folder / "secrets/wireguard.json").read_text())
    for name in ADDRESSES:
        key = fleet.ssh(name, f"cat {mesh.KEY}").stdout.strip()
        assert fleet.ssh(name, f"wg pubkey < {mesh.KEY}").stdout.strip() == record[name]
        assert fleet.ssh(
            name, f"stat --format='%a %U' {mesh.KEY} {mesh.CONFIGURATION}"
        ).stdout.split("\n")[:2] == [
            "600 root",
            "600 root",
        ]
        found = fleet.ssh(
            name,
            f"journalctl --no-pager | grep -cF '{key}'; grep -rlF '{key}' /etc /var /tmp; true",
        )
        assert found.stdout.split() == ["0", str(mesh.KEY)]
        assert key not in said
        assert key not in json.dumps(record)
    assert fleet.deploy()[0] == []


def test_peers_change_without_a_restart_and_hubs_pass_on(fleet: Fleet) -> None:
    started = (
        "systemctl show --property=ActiveEnterTimestampMonotonic --value wg-quick@wg-hivewright"
    )
    fleet.deploy()
    before = fleet.ssh("h2", started).stdout
    fleet.deploy(h4={"wireguard": False})
    assert fleet.ssh("h2", "wg show wg-hivewright peers | wc -l").stdout.strip() == "1"
    assert fleet.ssh("h2", started).stdout == before
    assert fleet.reaches("h2", "h3"), "the key is still there after a reload"
    left = fleet.ssh("h4", "ls /etc/wireguard; ip -o link show | grep -c wg-hivewright; true")
    assert left.stdout.split() == ["0"]

    fleet.deploy(h2={"wireguard_hub": True}, h4={"wireguard_endpoint": "none"})
    assert fleet.ssh("h3", "wg show wg-hivewright peers | wc -l").stdout.strip() == "1"
    assert fleet.reaches("h4", "h3")
    assert fleet.reaches("h3", "h4")
    # A hub does not forward into its own network.
    asked = "ip route get {} from 10.86.0.3 iif wg-hivewright"
    assert "dev wg-hivewright" in fleet.ssh("h2", asked.format("10.86.0.4")).stdout
    assert fleet.ssh("h2", asked.format("10.88.0.1"), check=False).returncode != 0
    assert fleet.deploy(h2={"wireguard_hub": True}, h4={"wireguard_endpoint": "none"})[0] == []


def test_run_that_is_limited_to_one_host_knows_the_others(fleet: Fleet) -> None:
    fleet.deploy()
    fleet.ssh(
        "h3",
        "systemctl disable --now --quiet wg-quick@wg-hivewright; rm"
        " /etc/wireguard/wg-hivewright.conf",
    )
    changed, _ = fleet.deploy("h3")
    assert changed == ["WireGuard | Connect it to its peers"]
    assert fleet.reaches("h3", "h2")
    (fleet.folder / "secrets/wireguard.json").unlink()
    assert fleet.deploy("h2")[0] == [], (
        "another operator's machine, which knows none of the keys, changes nothing"
    )
    everywhere = {name: {"wireguard": False} for name in ADDRESSES}
    fleet.deploy(**everywhere)
    assert fleet.deploy(**everywhere)[0] == []
    assert fleet.ssh("h2", "ls -A /etc/wireguard").stdout == ""
