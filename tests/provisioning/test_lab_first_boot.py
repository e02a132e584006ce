"""Hosts in their first minutes: locked package lists, an interrupted installation."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.lab import Lab
from lab.lab_host import Host
from tests.provisioning.conftest import booted

pytestmark = [pytest.mark.lab, pytest.mark.nightly, pytest.mark.timeout(900)]

INVENTORY = """\
from lab.access import operator_access

workers = [(f"h{n}", {"ssh_hostname": f"10.88.0.1{n}"}) for n in (1, 2)]
all = (["h1", "h2"], {**operator_access(), "slots": 1, "swarm_enabled": False})
"""
LOCKED_SECONDS = 25
# An fcntl lock as apt's own: F_SETLK (6), F_WRLCK (1), struct flock of 64-bit Linux.
HOLD_LOCK = f"""\
open(my $file, ">>", "/var/lib/apt/lists/lock") or die $!;
my $lock = pack("s s x4 q q i x4", 1, 0, 0, 0, 0); fcntl($file, 6, $lock) or die $!;
print "held\\n"; close(STDOUT); sleep {LOCKED_SECONDS};
"""


@pytest.fixture(scope="module")
def fresh() -> Iterator[Lab]:
    yield from booted(Lab("labfresh", is_bare=True), num_hosts=2)


def interrupt_installation(host: Host) -> None:
    """Leave a package unpacked and not configured, as a power cut does."""
    host.ssh(
        "mkdir -p /root/half/DEBIAN && printf 'Package: half\\nVersion: 1\\nArchitecture:"
        " all\\nMaintainer: t\\nDescription: t\\n' > /root/half/DEBIAN/control && dpkg-deb -b"
        " /root/half /root/half.deb >/dev/null && dpkg --unpack /root/half.deb >/dev/null",
        timeout=60,
    )
    assert "half" in host.ssh("dpkg --audit").stdout


def test_locked_lists_are_waited_for_and_an_interrupted_installation_is_finished(
    fresh: Lab, tmp_path: Path
) -> None:
    interrupted, locked = fresh.host(1), fresh.host(2)
    interrupt_installation(interrupted)
    locked.ssh(f"cat > /root/hold.pl <<'END'\n{HOLD_LOCK}END\n")
    locked.ssh(
        "setsid perl /root/hold.pl > /root/held 2>&1 < /dev/null & sleep 2; grep -q '^held'"
        " /root/held"
    )
    (tmp_path / "fleet.py").write_text(INVENTORY)
    command = (
        "pyinfra",
        "-y",
        "--json",
        tmp_path / "fleet.py",
        "tests/provisioning/debian_deploy.py",
    )
    done = fresh.operator(*command, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "installed" in interrupted.ssh("dpkg-query -W -f '${db:Status-Status}' half").stdout
    assert interrupted.ssh("dpkg --audit").stdout == ""
    again = json.loads(fresh.operator(*command, timeout=600).stdout)["results"]["operations"]
    assert [each["name"] for each in again if each["success"]] == []
