"""The account service on a real host: all of its secrets, a tailnet, and the way back.

The tests run in this order on h1, which is a coordinator and nothing else.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploys.fleet import pyinfra_process
from deploys.inventory.secret_files import ACCOUNT_SECRETS
from lab.lab import Lab
from lab.lab_tailnet import KEY, SERVER, LabTailnet, why_no_tailnet
from lab.process import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(900)]

DEPLOY_SECONDS = 600
UNIT = "hivewright-account.service"
PAGE = "http://127.0.0.1:3000"
INVENTORY = """
from lab.access import operator_access
from worker.environments.presets import DEMO_SETTINGS

own = {"ssh_hostname": "10.88.0.11", "account_host": "10.88.0.11"}
coordinators = [("h1", {**operator_access(), **DEMO_SETTINGS, **own, **CHANGES})]
"""
ENROL = """
from pathlib import Path
from worker import settings
from worker.chain.account_client import AccountClient
from worker.swarm import identity
node = identity.create(Path("/tmp/node.pem"))
client = AccountClient(settings.Chain(account_url="http://127.0.0.1:3000"), Path("/tmp/node"))
client.enrol(node, "SECRET")
print(client.swarm().account)
"""


class Hub:
    """The host, its inventory, and the secrets on the operator's side."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.host, self._folder = lab, lab.host(1), folder
        for key in ACCOUNT_SECRETS:
            self.write(key, f"first-{key}")

    def write(self, key: str, secret: str) -> None:
        (self._folder / key).write_text(secret + "\n")

    def inventory(self, **changes: Any) -> Path:
        file = self._folder / "hub.py"
        settings = {
            **{key: str(self._folder / key) for key in ACCOUNT_SECRETS},
            "account_operators": ["host@example.org"],
            "account_smtp_host": "127.0.0.1",
            "account_smtp_user": "swarm",
            "account_oidc_issuer": "https://login.example.org",
            "account_oidc_client_id": "hivewright",
            "account_oidc_name": "Example",
            **changes,
        }
        file.write_text(INVENTORY.replace("CHANGES", repr(settings)))
        return file

    def pyinfra(self, operation: str, **changes: Any) -> "subprocess.CompletedProcess[str]":
        program = ("pyinfra", "-y", self.inventory(**changes), operation)
        done = self.lab.operator(*program, timeout=DEPLOY_SECONDS, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    def run(self, command: str) -> str:
        return str(self.host.ssh(command).stdout)

    def main_pid(self, unit: str) -> int:
        return int(self.run(f"systemctl show --property=MainPID --value {unit}"))


@pytest.fixture(scope="module")
def hub(own_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Hub:
    hub = Hub(own_lab, tmp_path_factory.mktemp("hub"))
    hub.pyinfra("deploy.py")
    return hub


def test_page_is_up_and_people_get_accounts(hub: Hub) -> None:
    page = hub.run(f"curl --silent --fail {PAGE}/sign-in")
    assert "Continue with Example" in page
    assert "Continue with e-mail" in page
    invited = hub.run(
        "sudo -u hivewright hivewright account invite --settings /etc/hivewright/account.yaml"
        " --nodes 2 --until 2999-01-01"
    )
    secret = re.search(r"token\s+(\S+)", invited)
    assert secret is not None
    # /tmp of the running host is a file system of its own.
    (hub.host.root / "root/enrol.py").write_text(ENROL.replace("SECRET", secret[1]))
    account = hub.run(
        "cd /opt/hivewright/current && PYTHONPATH=. environment/bin/python /root/enrol.py"
    ).strip()
    operator = json.loads(hub.run(f"curl --silent {PAGE}/api/swarm"))["account"]
    assert account.startswith("0x")
    assert account != operator


def test_secrets_are_roots_files_and_nowhere_else(hub: Hub) -> None:
    for name in ACCOUNT_SECRETS.values():
        file = f"/etc/hivewright/account-{name}"
        assert hub.run(f"stat --format='%U %a' {file}").split() == ["root", "600"]
    pid = hub.main_pid(UNIT)
    shown = hub.run(
        f"systemctl cat {UNIT}; cat /etc/hivewright/*.yaml; tr '\\0' '\\n' < /proc/{pid}/environ;"
        f" tr '\\0' ' ' < /proc/{pid}/cmdline; journalctl --no-pager --unit={UNIT}"
    )
    assert "LoadCredential=smtp.password:/etc/hivewright/account-smtp.password" in shown
    assert "first-" not in shown
    other = hub.host.ssh(
        "sudo -u hivewright cat /etc/hivewright/account-smtp.password", check=False
    )
    assert other.returncode != 0


def test_second_deploy_changes_nothing(hub: Hub) -> None:
    results = pyinfra_process.deploy_json(
        str(hub.inventory()), prefix=hub.lab.network.inside(), timeout=DEPLOY_SECONDS
    )
    changed = [each["name"] for each in results["operations"] if each["success"] or each["error"]]
    assert changed == []


def test_new_secret_restarts_the_service_alone_and_a_rollback_brings_the_old_one(hub: Hub) -> None:
    chain, account = hub.main_pid("hivewright-chain.service"), hub.main_pid(UNIT)
    hub.write("account_smtp_password_file", "second")
    hub.pyinfra("deploy.py")
    file = "/etc/hivewright/account-smtp.password"
    assert hub.run(f"cat {file}") == "second\n"
    assert hub.main_pid("hivewright-chain.service") == chain
    assert hub.main_pid(UNIT) != account
    hub.pyinfra("deploys.rollback.go_back")
    assert hub.run(f"cat {file}") == "first-account_smtp_password_file\n"
    assert hub.run(f"systemctl is-active {UNIT}").strip() == "active"
    hub.write("account_smtp_password_file", "first-account_smtp_password_file")


@pytest.fixture
def joined(hub: Hub) -> Iterator[LabTailnet]:
    if reason := why_no_tailnet():
        pytest.skip(reason)
    tailnet = LabTailnet(hub.lab)
    tailnet.start()
    tailnet.install(hub.host)
    yield tailnet
    hub.host.ssh("tailscale logout", check=False)


def test_tailscale_serve_names_the_person_who_is_let_in(
    hub: Hub, joined: LabTailnet, tmp_path: Path
) -> None:
    """By plain HTTP inside of the tailnet: a certificate would come from the internet."""
    (tmp_path / "key").write_text(KEY)
    hub.pyinfra(
        "deploy.py",
        tailscale=True,
        tailscale_login_server=SERVER,
        tailscale_auth_key_file=str(tmp_path / "key"),
        tailscale_serve_http={80: 3000},
    )
    address = hub.run("tailscale ip -4").strip()
    shown = json.loads(hub.run("tailscale status --json"))
    name = str(shown["Self"]["DNSName"]).rstrip(".")  # serve answers to the name alone
    wait_until(
        lambda: "pong" in joined._pinged(address), 30, f"h1 answers at {address} in the tailnet"
    )

    def curl(*arguments: str) -> "subprocess.CompletedProcess[str]":
        limits = ("--max-time", "20", "--resolve", f"{name}:80:{address}")
        return hub.lab.operator("curl", "--silent", *limits, *arguments, timeout=30, check=False)

    def page(*flags: str) -> str:
        return str(curl(*flags, f"http://{name}/sign-in").stdout)

    wait_until(lambda: "Sign in" in page(), 60, "the page answers in the tailnet")
    named = re.search(r"Continue as (\S+@\S+)\s*<", page())
    assert named is not None, page()
    # What a visitor sends is taken away, and the name of the tailnet's user put there.
    assert f"Continue as {named[1]}" in page("--header", "Tailscale-User-Login: host@example.org")
    # A process on the host can't pretend to be that proxy.
    forged = hub.run(
        "sudo -u nobody curl --silent --header 'Tailscale-User-Login: host@example.org'"
        f" --header 'X-Forwarded-For: 100.64.0.9' {PAGE}/sign-in"
    )
    assert "Continue as" not in forged
    flags = ("--header", f"Origin: http://{name}", "--data", "next=", "--include")
    done = curl(*flags, f"http://{name}/sign-in/tailscale")
    assert "hivewright_session=" in done.stdout, done.stdout
