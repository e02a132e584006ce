"""The Tailscale part of a deploy with the real tailscaled; hosts are reached by their addresses in the tailnet.

The programs are found in the folder that HIVEWRIGHT_TAILSCALE names; without it these tests are skipped.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploys import tailssh
from tests.lab.host import Host
from tests.lab.process import wait_until
from tests.lab.tailnet import SERVER, LabTailnet

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(300)]

CONFIRM_SECONDS = 5


class Fleet:
    """The hosts of the lab, deployed by their addresses in the tailnet or by those of the lab."""

    def __init__(self, tailnet: LabTailnet, folder: Path) -> None:
        self.tailnet, self._folder = tailnet, folder

    def host(self, number: int) -> Host:
        return self.tailnet.lab.host(number)

    def deploy(self, addresses: dict[int, str], **data: Any) -> "subprocess.CompletedProcess[str]":
        """Run the Tailscale part of a deploy on these hosts: number -> address."""
        workers = [
            (f"h{number}", {"ssh_hostname": address, "tailscale": True, "tailscale_login_server": SERVER, **data})
            for number, address in addresses.items()
        ]
        inventory = self._folder / "fleet.py"
        inventory.write_text(
            "from tests.lab.access import operator_access\n"
            f"workers = [(name, {{**operator_access(), **data}}) for name, data in {workers!r}]\n"
        )
        program = ("pyinfra", "-y", "--diff", "--json", inventory, "tests/provisioning/tailscale_deploy.py")
        return self.tailnet.lab.operator(*program, timeout=200, check=False)

    def runs_ssh(self, number: int) -> bool:
        return bool(self.tailnet.preferences(self.host(number))["RunSSH"])


@pytest.fixture
def fleet(tailnet: LabTailnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setenv("CONFIRM_SECONDS", str(CONFIRM_SECONDS))
    yield Fleet(tailnet, tmp_path)
    for host in tailnet.lab.hosts:
        host.ssh("tailscale set --ssh=false && tailscale logout", check=False)
    tailnet.set("set", ssh=1, allow=1, https=1)


def changes(done: "subprocess.CompletedProcess[str]") -> list[str]:
    operations = json.loads(done.stdout)["results"]["operations"]
    return [operation["name"] for operation in operations if operation["success"] or operation["error"]]


def test_ssh_server_is_switched_only_where_the_operator_still_gets_in(fleet: Fleet) -> None:
    fleet.tailnet.set("set", allow=0)
    addresses = {number: fleet.tailnet.login(fleet.host(number)) for number in (1, 2)}
    # The inventory does not name it: as the host has it.
    done = fleet.deploy(addresses)
    assert (done.returncode, changes(done)) == (0, []), done.stderr
    # Nobody would get in any more: taken back, on both hosts.
    done = fleet.deploy(addresses, tailscale_ssh=True)
    assert done.returncode == 1
    for name in ("h1", "h2"):
        assert f"{name}: tailscale_ssh: True would lock this side out: within 5 s no new connection" in done.stderr
    assert "The host was switched back, and can be reached as before" in done.stderr
    assert "the tailnet's policy needs an `ssh` rule" in done.stderr
    assert "Traceback" not in done.stderr
    assert [fleet.runs_ssh(number) for number in addresses] == [False, False]
    # With a rule the run goes on over a new connection.
    fleet.tailnet.set("set", allow=1)
    done = fleet.deploy(addresses, tailscale_ssh=True, tailscale_hostname="renamed")
    assert done.returncode == 0, done.stderr
    assert changes(done) == ["Tailscale | Set its preferences", "Tailscale | Switch its ssh server"]
    assert [fleet.runs_ssh(number) for number in addresses] == [True, True]
    done = fleet.deploy(addresses)
    assert (done.returncode, changes(done)) == (0, []), done.stderr


def test_ssh_server_that_alone_lets_the_operator_in_is_not_turned_off(fleet: Fleet) -> None:
    address = {1: fleet.tailnet.login(fleet.host(1), "--ssh")}
    keys = fleet.host(1).root / "root/.ssh/authorized_keys"
    away = keys.rename(keys.with_suffix(".away"))
    try:
        done = fleet.deploy(address, tailscale_ssh=False)
    finally:
        away.rename(keys)
    assert done.returncode == 1
    assert "the host's own sshd must let in whoever deploys" in done.stderr
    assert fleet.runs_ssh(1)
    done = fleet.deploy(address, tailscale_ssh=False)
    assert done.returncode == 0, done.stderr
    assert not fleet.runs_ssh(1)


def test_host_takes_the_switch_back_when_its_operator_is_gone(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.tailnet.login(fleet.host(2))
    monkeypatch.setattr(tailssh, "CONFIRM_SECONDS", 3)
    fleet.host(2).ssh(tailssh.switch_script(is_on=True))
    wait_until(lambda: fleet.runs_ssh(2), 10, "the ssh server is on")
    wait_until(lambda: not fleet.runs_ssh(2), 10, "the ssh server is off again")
    assert fleet.host(2).ssh(tailssh.confirm_script(is_on=True), check=False).returncode != 0
