"""Hosts with Debian 13: another Python, another systemd.

Everything but a release is deployed, since there is no build of torch for its Python here.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.lab import Lab
from tests.provisioning.conftest import booted

pytestmark = [pytest.mark.lab, pytest.mark.nightly, pytest.mark.timeout(1200)]

INVENTORY = """\
from lab.access import operator_access

def mesh(n):
    own = {"wireguard": True, "wireguard_address": f"10.86.0.{n}"}
    return f"h{n}", {"ssh_hostname": f"10.88.0.1{n}", **own}

workers = [mesh(1), mesh(2)]
all = (["h1", "h2"], {**operator_access(), "slots": 1, "swarm_enabled": False})
"""
UNITS = ("worker@0", "enrol@0", "chain", "contract", "bootnode", "keeper", "account", "dashboard")


@pytest.fixture(scope="module")
def trixie() -> Iterator[Lab]:
    yield from booted(Lab("labtrixie", suite="trixie", is_bare=True))


def deploy(lab: Lab, folder: Path) -> list[str]:
    (folder / "fleet.py").write_text(INVENTORY)
    command = (
        "pyinfra",
        "-y",
        "--json",
        folder / "fleet.py",
        "tests/provisioning/debian_deploy.py",
    )
    done = lab.operator(*command, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        each["name"] for each in json.loads(done.stdout)["results"]["operations"] if each["success"]
    ]


def test_hosts_of_debian_13_become_what_those_of_12_do(trixie: Lab, tmp_path: Path) -> None:
    host = trixie.host(1)
    assert "VERSION_CODENAME=trixie" in host.ssh("cat /etc/os-release").stdout
    deploy(trixie, tmp_path)
    assert deploy(trixie, tmp_path) == []
    assert (
        host.ssh("ls -d /opt/hivewright/releases && id -un hivewright").stdout.split()[-1]
        == "hivewright"
    )
    assert (
        trixie.host(2).ssh("ip -o -4 addr show wg-hivewright").stdout.split()[3] == "10.86.0.2/16"
    )


def test_units_are_good_and_sealed_for_its_systemd(trixie: Lab) -> None:
    host = trixie.host(1)
    names = [f"hivewright-{unit}.service" for unit in UNITS]
    # It looks for the programs too, which come with a release.
    program = "mkdir -p /opt/hivewright/current/environment/bin && ln -sf /bin/true $_/python"
    said = host.ssh(
        f"{program}; systemctl daemon-reload; systemd-analyze verify {' '.join(names)}", timeout=60
    )
    assert "hivewright" not in said.stdout + said.stderr
    for name in names:
        exposure = host.ssh(f"systemd-analyze security --no-pager {name} | tail -n 1").stdout
        assert float(exposure.split(": ")[1].split()[0]) <= 2.0, exposure
