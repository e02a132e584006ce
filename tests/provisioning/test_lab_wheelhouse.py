"""A whole deploy to hosts with only Debian and ssh: no route out, no environment, no git."""

import json
from pathlib import Path

import pytest

from deploys.fleet import pyinfra_process
from deploys.offline import wheelhouse
from deploys.offline.wheelhouse import Target
from lab.lab import Lab
from lab.process import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.nightly, pytest.mark.timeout(3000)]

DEPLOY_SECONDS = 1500
INVENTORY = """\
from lab.access import operator_access
from worker.environments.presets import DEMO_SETTINGS

coordinators = [("h1", {"ssh_hostname": "10.88.0.11", "account_host": "10.88.0.11"})]
workers = [("h2", {"ssh_hostname": "10.88.0.12", "slots": 1})]
all = (
    ["h1", "h2"],
    {**operator_access(), **DEMO_SETTINGS, "keeper_min_peers": 1, "keeper_round_seconds": 30.0,
     "release_source": "wheelhouse"},
)
"""


@pytest.fixture(scope="module")
def inventory(bare_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Collect beforehand with this machine's internet, since the lab's operator has none."""
    repository = str(bare_lab.folder / "repository.git")
    commit = bare_lab.publish()
    glibc, version = (
        bare_lab.host(1)
        .ssh(
            "getconf GNU_LIBC_VERSION | cut -d ' ' -f 2;"
            " python3 -c 'import sys; print(\"%d.%d\" % sys.version_info[:2])'"
        )
        .stdout.split()
    )
    wheelhouse.pack_wheels(repository, commit, Target("x86_64", version, glibc, None))
    wheelhouse.pack_anvil(repository, commit)
    file = tmp_path_factory.mktemp("inventory") / "offline.py"
    file.write_text(INVENTORY)
    return file


def test_hosts_without_a_way_out_train_from_what_was_shipped(
    bare_lab: Lab, inventory: Path
) -> None:
    for number in (1, 2):
        assert bare_lab.host(number).ssh("ip route show default").stdout == ""
        assert bare_lab.host(number).ssh("ls /opt; command -v git; true").stdout == ""
    done = bare_lab.operator(
        "pyinfra", "-y", inventory, "deploy.py", timeout=DEPLOY_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    finished = bare_lab.host(2).root / "var/lib/hivewright/worker-0/rounds.jsonl"
    wait_until(finished.exists, 240, "h2 trains a first round")
    assert json.loads(finished.read_text().splitlines()[0])["round"] >= 0
    for number in (1, 2):
        there = (
            "cd /opt/hivewright && ls -d environments/* wheels/* | wc -l; find shipped -type f"
            " -links 1 | wc -l"
        )
        assert bare_lab.host(number).ssh(there).stdout.split() == ["2", "0"]


def test_second_run_sends_nothing_and_changes_nothing(bare_lab: Lab, inventory: Path) -> None:
    results = pyinfra_process.deploy_json(
        str(inventory), prefix=bare_lab.network.inside(), timeout=DEPLOY_SECONDS
    )
    changed = [
        operation["name"]
        for operation in results["operations"]
        if operation["success"] or operation["error"]
    ]
    assert changed == []
    assert results["failed_hosts"] == []
