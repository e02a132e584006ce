"""The deploy's units on a real host: confinement of services, and pauses between restarts.

Each test runs its own program instead of the service's, with everything else of the unit.
"""

import re
from pathlib import Path

import pytest

from deploys import answers_view, units
from deploys.services import DASHBOARD_UNIT, WORKER_UNIT
from lab.lab import Lab
from lab.lab_host import Host
from lab.process import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.nightly, pytest.mark.timeout(300)]

ACCOUNT_UNIT = "hivewright-account.service"
STATE = "/var/lib/hivewright"
FORBIDDEN = [
    f"{STATE}/{name}"
    for name in (
        "worker-1/swarm.pem",
        "account/account.key",
        "keeper/owner.key",
        "retired/worker-7-x/swarm.pem",
    )
]


@pytest.fixture
def host(lab: Lab) -> Host:
    host = lab.host(4)
    host.ssh(
        "id hivewright >/dev/null 2>&1 || useradd --system --no-create-home hivewright;"
        " mkdir -p /opt/hivewright/current /etc/hivewright; touch /etc/hivewright/enrolment.token;"
        f" for f in {' '.join(FORBIDDEN)} {STATE}/worker-0/own {STATE}/keeper/deployment.json; do"
        " mkdir -p $(dirname $f) && echo secret > $f; done;"
        f" chown -R hivewright: {STATE}/*"
    )
    return host


def install(host: Host, unit: str, program: str, **changes: str) -> str:
    """Install a unit under another name with the shell script `program`; return the name."""
    name = unit.replace("hivewright-", "probe-")
    version = int(host.ssh("systemctl --version").stdout.split()[1])
    text = re.sub(
        r"(?m)^ExecStart=.*$",
        f"ExecStart=/bin/sh -c '{program.replace('$', '$$')}'",
        units.render(unit, version, 900),
    )
    for key, value in {"Type": "exec", **changes}.items():
        text = re.sub(rf"(?m)^{key}=.*$", f"{key}={value}", text)
    file = host.root / "etc/systemd/system" / name
    file.write_text(text)
    host.ssh("systemctl daemon-reload")
    return name.replace("@.", "@0.")


def said(host: Host, unit: str) -> list[str]:
    return host.ssh(
        f"journalctl --no-pager --output=cat --unit={unit} | grep '^probe:'", check=False
    ).stdout.splitlines()


@pytest.mark.parametrize("has_wall", [True, False])
def test_worker_reads_no_key_of_another_service_neither_at_its_place_nor_through_its_process(
    host: Host, has_wall: bool
) -> None:
    """Without the user namespace the process is reachable, so the namespace protects it."""
    wall = {} if has_wall else {"PrivateUsers": "no"}
    account = install(host, ACCOUNT_UNIT, "sleep 600", **wall)
    host.ssh(f"systemctl restart {account}")
    pid = host.ssh(f"systemctl show --property=MainPID --value {account}").stdout.strip()
    through = [
        f"/proc/{pid}/root{STATE}/account/account.key",
        f"/proc/{pid}/environ",
        f"/proc/{pid}/mem",
    ]
    probe = (
        f"for f in {' '.join([*FORBIDDEN, *through])} {STATE}/worker-0/own; do head -c 1 $f"
        " >/dev/null 2>&1 && echo probe: reads $f; done; for d in lib cache log; do touch"
        " /var/$d/hivewright/worker-0/new && echo probe: writes /var/$d; touch"
        " /var/$d/hivewright/x 2>/dev/null && echo probe: wrote next to /var/$d; done; echo probe:"
        " done"
    )
    worker_unit = install(host, WORKER_UNIT, probe, **wall)
    host.ssh(f"journalctl --rotate --vacuum-time=1s; systemctl restart {worker_unit}")
    wait_until(lambda: "probe: done" in said(host, worker_unit), 30, "the probe is done")
    reads = [
        line.removeprefix("probe: reads ") for line in said(host, worker_unit) if "reads" in line
    ]
    writes = [
        line.removeprefix("probe: ") for line in said(host, worker_unit) if "w" in line.split()[1]
    ]
    assert reads[-1] == f"{STATE}/worker-0/own"
    assert reads[:-1] == ([] if has_wall else through[:2])
    assert writes == [f"writes /var/{kind}" for kind in ("lib", "cache", "log")]
    host.ssh(f"systemctl stop {account} {worker_unit}")


def test_account_service_reads_which_contract_it_is_and_not_its_owners_key(host: Host) -> None:
    probe = (
        f"for f in {STATE}/keeper/*; do cat $f >/dev/null && echo probe: $f; done; echo probe: done"
    )
    account = install(host, ACCOUNT_UNIT, probe)
    host.ssh(f"systemctl restart {account}")
    wait_until(lambda: "probe: done" in said(host, account), 30, "the probe is done")
    assert said(host, account)[-2:] == [f"probe: {STATE}/keeper/deployment.json", "probe: done"]


def test_service_that_keeps_failing_waits_longer_each_time_and_is_not_given_up(host: Host) -> None:
    unit = install(host, WORKER_UNIT, "exit 1", RestartSec="100ms")

    def shown(name: str) -> str:
        return host.ssh(f"systemctl show --property={name} --value {unit}").stdout.strip()

    def pauses(seconds: int) -> bool:
        return (
            host.ssh(f"cat /proc/{shown('ControlPID')}/cmdline | tr '\\0' ' '", check=False).stdout
            == f"sleep {seconds} "
        )

    host.ssh(f"systemctl start {unit}", check=False)
    for num_restarts, seconds in ((1, 15), (2, 45), (3, 105)):
        wait_until(lambda s=seconds: pauses(s), 30, f"it pauses for {seconds} s", 0.2)
        assert (shown("NRestarts"), shown("ActiveState")) == (str(num_restarts), "activating")
        # Nobody waits for that here.
        host.ssh(f"kill {shown('ControlPID')}")
    host.ssh(f"systemctl stop {unit}", timeout=60)


def test_service_that_was_well_is_no_longer_held_responsible_for_earlier_ends(host: Host) -> None:
    """Pauses of seconds, healthy after four: the program ends at once three times, then runs."""
    unit = install(
        host, WORKER_UNIT, f"sleep $(cat {STATE}/worker-0/seconds); exit 1", RestartSec="100ms"
    )
    file = host.root / "etc/systemd/system" / WORKER_UNIT.replace("hivewright-", "probe-")
    text = file.read_text()
    assert "-ge 1800" in text
    file.write_text(
        text.replace("-ge 1800", "-ge 4")
        .replace("((15 <<", "((1 <<")
        .replace(")) - 15))", ")) - 1))")
    )
    host.ssh(
        f"echo 0 > {STATE}/worker-0/seconds; chmod 644 {STATE}/worker-0/seconds; systemctl"
        " daemon-reload"
    )
    host.ssh(f"systemctl start {unit}", check=False)

    def num_restarts() -> int:
        return int(host.ssh(f"systemctl show --property=NRestarts --value {unit}").stdout)

    wait_until(lambda: num_restarts() >= 3, 60, "it has ended three times", 0.2)
    host.ssh(f"echo 6 > {STATE}/worker-0/seconds")
    wait_until(lambda: num_restarts() == 0, 60, "its ends are forgotten", 0.2)
    host.ssh(f"systemctl stop {unit}", timeout=60)


def test_dashboard_sees_answers_of_a_worker_and_neither_its_key_nor_what_a_link_names(
    host: Host,
) -> None:
    node = f"{STATE}/worker-3"
    host.ssh(f"rm -rf {node}; install -d -m 700 -o hivewright -g hivewright {node}")
    host.ssh(f"install -m 600 -o hivewright -g hivewright /dev/null {node}/swarm.pem")
    probe = (
        f"for f in $(find {STATE} -type f -path *worker*) {node}/answers/*; do echo probe: sees $f;"
        f" done; touch {node}/answers/x 2>/dev/null && echo probe: writes; echo probe: done; sleep"
        " 600"
    )
    name = install(host, DASHBOARD_UNIT, probe)
    folder = host.root / f"etc/systemd/system/{name}.d"
    folder.mkdir(exist_ok=True)
    (folder / "hivewright.conf").write_text(answers_view.drop_in_text([Path(node)]))
    host.ssh("systemctl daemon-reload")

    def seen(before: str) -> list[str]:
        """Return what the dashboard says after these commands and a restart."""
        host.ssh(f"systemctl stop {name}; journalctl --rotate --vacuum-time=1s; {before}")
        host.ssh(f"systemctl restart {name}")
        wait_until(lambda: "probe: done" in said(host, name), 30, "the probe is done")
        return sorted(set(said(host, name)))

    # It is made by the first start, as the worker's.
    assert seen("true") == ["probe: done", f"probe: sees {node}/answers/*"]
    assert host.ssh(f"stat --format='%U %a' {node}/answers").stdout.split() == ["hivewright", "700"]
    found = seen(f"runuser -u hivewright -- touch {node}/answers/round-1")
    assert found == ["probe: done", f"probe: sees {node}/answers/round-1"]
    closed = host.ssh("runuser -u hivewright -- ls /run/hivewright-answers", check=False)
    assert "Permission denied" in closed.stderr
    link = f"rm -rf {node}/answers; runuser -u hivewright -- ln -s ../keeper {node}/answers"
    assert seen(link) == ["probe: done", f"probe: sees {node}/answers/*"]
    host.ssh(f"systemctl stop {name}; rm -rf {node} /etc/systemd/system/{name}*")
    assert "hivewright-answers" not in host.ssh("cat /proc/mounts").stdout
