"""The whole deploy.py through pyinfra's own command line, on hosts of its @fake connector: nothing is touched."""

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploys import hosts
from deploys.hosts import HostEntry

CHECKOUT = Path(__file__).parents[2]
PYINFRA_KEYS = ("ssh_hostname", "ssh_user", "_sudo", "_timeout")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def pyinfra(*arguments: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyinfra", *map(str, arguments)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture
def write_inventory(tmp_path: Path) -> Any:
    def write(hub: dict[str, Any], *workers: dict[str, Any]) -> Path:
        common = {
            "fake_delay": 0.0,
            "fake_delay_jitter": 0.0,
            "fake_responses": {"uname -s": "Linux", "command -v useradd": "/usr/sbin/useradd"},
            "release_repository": "https://git.example.org/h.git",
            "release_ref": COMMIT,
            "secrets_dir": str(tmp_path / "secrets"),
        }
        named = [(f"@fake/gpu-{number}", common | data) for number, data in enumerate(workers)]
        file = tmp_path / "fleet.py"
        file.write_text(f"coordinators = [('@fake/hub', {common | hub!r})]\nworkers = {named!r}\n")
        return file

    return write


def test_everything_of_the_coordinator_comes_before_anything_of_a_worker(write_inventory: Any) -> None:
    inventory = write_inventory({"account_host": "192.0.2.10"}, {"slots": 2}, {"slots": 1})
    done = pyinfra("-y", "--json", inventory, "deploy.py")
    assert done.returncode == 0, done.stderr
    names = [operation["name"] for operation in json.loads(done.stdout)["results"]["operations"]]
    barrier = names.index("Account | Wait until it answers")
    assert max(number for number, name in enumerate(names) if name.startswith("Coordinator")) < barrier
    assert min(number for number, name in enumerate(names) if name.startswith("Worker")) > barrier
    assert names.index("Coordinator | Run the chain") < names.index("Coordinator | Run the contract")
    assert names.index("Worker | Enrol slot 1") > names.index("Worker | Run slot 0")


def test_token_is_in_no_output(write_inventory: Any, tmp_path: Path) -> None:
    inventory = write_inventory({"account_host": "192.0.2.10"}, {"slots": 1})
    done = pyinfra("-y", "-vvv", "--debug", "--diff", inventory, "deploy.py")
    assert done.returncode == 0, done.stderr
    token = (tmp_path / "secrets/enrolment.token").read_text().strip()
    assert "Write the enrolment token" in done.stderr
    said = done.stdout + done.stderr
    assert token not in said
    assert base64.b64encode(f"{token}\n".encode()).decode() not in said


def test_wrong_inventory_stops_before_any_command(write_inventory: Any, tmp_path: Path) -> None:
    inventory = write_inventory({"account_host": "192.0.2.10"}, {"slots": 1, "trainer_groupsize": 8}, {"slots": 0})
    done = pyinfra("-y", "-vvv", inventory, "deploy.py")
    assert done.returncode == 1
    said = done.stderr
    assert "inventory data of @fake/gpu-0: trainer_groupsize: not a known key" in said
    assert "inventory data of @fake/gpu-1: slots: none; expected a count of at least 1" in said
    assert ">>>" not in said  # pyinfra's mark of a command that is run
    assert not (tmp_path / "secrets").exists()


def test_wrong_key_does_not_need_the_host_that_has_it(write_inventory: Any) -> None:
    """All hosts are checked, also those that this run is limited away from."""
    inventory = write_inventory({"account_host": "192.0.2.10"}, {"slots": 1}, {"slot": 1})
    done = pyinfra("-y", inventory, "deploy.py", "--limit", "@fake/gpu-0")
    assert done.returncode == 1
    assert "inventory data of @fake/gpu-1: slot: not a known key; did you mean slots?" in done.stderr


@pytest.mark.parametrize("name", ["example", "local"])
def test_shipped_inventory_is_right(name: str) -> None:
    done = pyinfra("--json", f"inventory/{name}.py", "debug-inventory")
    assert done.returncode == 0, done.stderr
    entries = [HostEntry(host["name"], host["groups"], host["data"], PYINFRA_KEYS) for host in json.loads(done.stdout)]
    plans = hosts.check(entries)
    assert sum(len(plan.slots) for plan in plans.values()) >= 1
    assert sum(bool(plan.services) for plan in plans.values()) == 1
    assert all(entry.data["_timeout"] == 120 for entry in entries)


def test_lab_inventory_says_how_to_get_to_its_hosts() -> None:
    done = pyinfra("-y", "inventory/lab.py", "deploy.py")
    assert done.returncode == 1
    assert "not in the lab's network; put `ip netns exec lab-op` before the command, or use `make fleet`" in done.stderr
