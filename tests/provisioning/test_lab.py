"""The lab itself: whatever happens, nothing of it is left behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import cgroups
from lab.lab import Lab
from lab.lab_host import CHECKOUT
from lab.process import LabError, recall, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(600)]

NAME = "labcrash"
BOOT_AND_WAIT = f"""
import time
from lab.lab import Lab

lab = Lab("{NAME}")
lab.up(1, goes_with_this_process=True)
print("up", flush=True)
time.sleep(300)
"""


def leftovers(name: str) -> list[str]:
    """Return everything on this machine that has the lab's name."""
    found = [str(path) for path in Path("/run/netns").glob(f"{name}-*")]
    found += [
        line
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if f"/hivewright-lab/{name}/" in line
    ]
    found += [str(group) for group in cgroups.folders(name) if group.exists()]
    found += [str(path) for path in Path("/run/systemd/nspawn/propagate").glob(f"{name}-*")]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"/hivewright-lab/{name}/" in command or f"netns exec {name}-op" in command:
            found.append(command)
    return found


@pytest.mark.nightly
def test_hosts_go_off_with_their_owner_and_down_removes_the_rest(lab: Lab) -> None:
    crashed = Lab(NAME)
    boot = [sys.executable, "-c", BOOT_AND_WAIT]
    try:
        with subprocess.Popen(boot, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as owner:
            try:
                assert owner.stdout is not None
                assert owner.stdout.readline() == "up\n"
                assert leftovers(NAME)
            finally:
                owner.kill()
        launcher = crashed.host(1).folder / "launcher.pid"
        wait_until(lambda: recall(launcher) is None, 40, "the host of the killed owner is off")
    finally:
        crashed.down()
    assert leftovers(NAME) == []
    assert not crashed.folder.exists()


def test_lab_of_another_run_is_left_alone(lab: Lab) -> None:
    other = Lab(lab.name)
    for action in (lambda: other.up(1, goes_with_this_process=True), other.down):
        with pytest.raises(
            LabError, match=f"the lab {lab.name} belongs to another run of the tests"
        ):
            action()
    assert lab.is_up()


def test_hosts_reach_each_other_and_nothing_else(lab: Lab) -> None:
    host = lab.host(2)
    assert host.ssh("timeout 5 bash -c '</dev/tcp/10.88.0.13/22'", check=False).returncode == 0
    assert host.ssh("ip route show default").stdout == ""
    assert host.ssh("timeout 5 bash -c '</dev/tcp/192.0.2.1/22'", check=False).returncode != 0


def test_cut_host_is_gone_and_healed_host_is_back(lab: Lab) -> None:
    host = lab.host(3)
    host.cut()
    try:
        assert host.ssh("true", check=False).returncode != 0
    finally:
        host.heal()
    started = time.monotonic()
    host.wait_for_ssh()
    assert time.monotonic() - started < 10
