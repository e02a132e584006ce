"""A host deployed by a normal user through sudo with a password, and its uninstallation.

h4 trains alone. The tests run in this order on one host.
"""

import json
import secrets
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deploys.fleet import pyinfra_process
from lab.lab import Lab
from lab.lab_host import Host
from lab.process import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(600)]

DEPLOY_SECONDS = 400
STATE = "/var/lib/hivewright"
KEY = f"planted-{secrets.token_hex(16)}"  # not in the sources on the host
INVENTORY = """
from lab.access import operator_access
from worker.environments.presets import DEMO_SETTINGS

own = {"ssh_hostname": "10.88.0.14", "ssh_user": "alice", "_sudo": True, "swarm_enabled": False}
own["_sudo_password_file"] = PASSWORD
workers = [("h4", {**operator_access(), **DEMO_SETTINGS, **own, "slots": 1, **CHANGES})]
"""


class OneHost:
    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.host, self._folder = lab, lab.host(4), folder

    def inventory(self, **changes: Any) -> Path:
        file, password = self._folder / "sudo.py", self._folder / "password"
        password.write_text("correct horse")
        file.write_text(
            INVENTORY.replace("CHANGES", repr(changes)).replace("PASSWORD", repr(str(password)))
        )
        return file

    def pyinfra(self, operation: str, **changes: Any) -> "subprocess.CompletedProcess[str]":
        program = ("pyinfra", "-y", self.inventory(**changes), operation)
        done = self.lab.operator(*program, timeout=DEPLOY_SECONDS, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    def is_active(self, slot: int) -> bool:
        return (
            self.host.ssh(
                f"systemctl is-active --quiet hivewright-worker@{slot}", check=False
            ).returncode
            == 0
        )

    def peer_id(self, slot: int) -> str:
        return str(
            json.loads(self.host.ssh(f"cat {STATE}/worker-{slot}/enrolment.json").stdout)["peer_id"]
        )


def num_rounds(host: Host) -> int:
    file = host.root / f"{STATE[1:]}/worker-0/rounds.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture(scope="module")
def one(own_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> OneHost:
    one = OneHost(own_lab, tmp_path_factory.mktemp("one"))
    one.host.ssh(
        "useradd --create-home --shell /bin/bash alice && install -d -m 700 -o alice -g alice"
        " /home/alice/.ssh && install -m 600 -o alice -g alice /root/.ssh/authorized_keys"
        " /home/alice/.ssh/authorized_keys && echo 'alice:correct horse' | chpasswd && echo 'alice"
        " ALL=(ALL) ALL' > /etc/sudoers.d/alice"
    )
    one.pyinfra("deploy.py")
    return one


def test_user_with_sudo_deploys_a_worker_that_trains_and_a_second_time_nothing_changes(
    one: OneHost,
) -> None:
    before = num_rounds(one.host)
    wait_until(lambda: num_rounds(one.host) > before, 90, "h4 trains", 0.5)
    owners = (
        f"stat --format=%U {STATE} {STATE}/retired {STATE}/worker-0/swarm.pem"
        " /opt/hivewright/current/deploy.py"
    )
    assert one.host.ssh(owners).stdout.split() == ["root", "root", "hivewright", "root"]
    inside = one.lab.network.inside()
    results = pyinfra_process.deploy_json(
        str(one.inventory()), prefix=inside, timeout=DEPLOY_SECONDS
    )
    assert [
        each["name"] for each in results["operations"] if each["success"] or each["error"]
    ] == []


@pytest.mark.nightly
def test_secret_of_a_worker_is_roots_file_and_the_workers_copy_and_nowhere_else(
    one: OneHost, tmp_path: Path
) -> None:
    """No tracker is on, so no package is installed; the worker gets its key all the same."""
    key, file = tmp_path / "wandb.key", "/etc/hivewright/worker-0.wandb.key"
    key.write_text(KEY + "\n")
    one.pyinfra("deploy.py", tracking_wandb_key_file=str(key))
    assert one.host.ssh(f"cat {file}; stat --format='%U %a' {file}").stdout.split() == [
        *(KEY, "root", "600")
    ]
    pid = one.host.ssh("systemctl show --property=MainPID --value hivewright-worker@0").stdout
    copy = f"/proc/{pid.strip()}/root/run/credentials/hivewright-worker@0.service/wandb.key"
    assert one.host.ssh(f"cat {copy}").stdout == KEY + "\n"
    seen = one.host.ssh(
        f"grep --recursive --files-with-matches {KEY} /etc /var /opt/hivewright/current /tmp;"
        f" journalctl --no-pager | grep --count {KEY}; ps -ef | grep -v grep | grep --count {KEY}",
        check=False,
    )
    assert seen.stdout.split() == [file, "0", "0"]
    one.pyinfra("deploy.py")
    assert one.host.ssh(f"ls {file}", check=False).returncode != 0


@pytest.mark.nightly
def test_host_goes_back_to_what_it_was_with_all_that_others_have_put_there(one: OneHost) -> None:
    drop_in = "/etc/systemd/system/hivewright-worker@0.service.d/somebodys.conf"
    peer_id = one.peer_id(0)
    one.pyinfra("deploy.py", slots=2, trainer_learning_rate=0.000123, slot_memory_gb=20.0)
    second = one.peer_id(1)
    assert one.is_active(1)
    one.host.ssh(f"printf '[Service]\\nNice=1\\n' > {drop_in}")
    one.pyinfra("deploys.rollback.go_back")
    assert one.is_active(0)
    assert not one.is_active(1)
    assert "0.000123" not in one.host.ssh("cat /etc/hivewright/worker-0.yaml").stdout
    assert one.host.ssh("ls /etc/systemd/system/hivewright-worker@0.service.d").stdout.split() == [
        "somebodys.conf"
    ]
    assert one.peer_id(0) == peer_id
    # A slot that went with the last deploy comes back as who it was.
    one.pyinfra("deploy.py", slots=2)
    one.pyinfra("deploy.py")
    assert (
        one.host.ssh(
            f"ls -d {STATE}/worker-1 {STATE}/retired/worker-1-*", check=False
        ).stdout.count("worker-1")
        == 1
    )
    one.pyinfra("deploys.rollback.go_back", slots=2)
    assert one.peer_id(1) == second
    assert one.is_active(1)
    one.pyinfra("deploy.py")
