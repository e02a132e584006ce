"""Deploying workers to lab hosts with `deploy.py`, against ansible-core with the same tasks.

    python -m benchmarks.fleet [--hosts 3 8] [--repeats 3] [--json FILE]

Runs as root, where the lab can run (lab/). Both bring bare hosts to a running worker that trains
alone: packages, user, folders, command, checkout of a commit, environment, settings checked by the
release, settings, unit, enrolment, service. Then both run again with nothing to change; workers are
frozen (SIGSTOP) meanwhile, so that they use no processor time. ansible-core comes from PyPI into a
temporary environment and is tuned for speed: pipelining, kept connections, a fork per host, no
facts gathered. Its `apt` module needs a package that the hosts do not have, so it asks dpkg in a
shell, which is faster. Ours also saves the host's state for a rollback and runs the doctor.

The largest fleet then gets a code change with `hivewright rollout`, two hosts at a time. A worker
that has finished its round for the gate is frozen again, since two cores cannot run eight workers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploys import paths, release, system, units
from deploys.inventory import validation
from deploys.inventory.host_plan import HostEntry
from deploys.inventory.slots import Slot
from deploys.paths import CURRENT, RELEASES
from deploys.services import WORKER_UNIT
from lab import cgroups, machine
from lab.lab import REPOSITORY_URL, Lab
from lab.lab_host import CHECKOUT, Host
from worker.environments.presets import DEMO_SETTINGS

ANSIBLE = "ansible-core==2.19.14"
RUN_SECONDS = 1500
SYSTEMD = 252  # of the lab's Debian 12
DATA: dict[str, Any] = {**DEMO_SETTINGS, "slots": 1, "swarm_enabled": False}
# Runs a command; says its seconds, the memory of its largest process, and the processor time of all
# of them.
MEASURED = (
    "import json,resource,subprocess,sys,time;b=time.monotonic();"
    "r=subprocess.run(sys.argv[2:],stdout=subprocess.DEVNULL,stderr=open(sys.argv[1]+'.log','w')).returncode;"
    "u=resource.getrusage(resource.RUSAGE_CHILDREN);"
    "json.dump([r,time.monotonic()-b,u.ru_maxrss/1024,u.ru_utime+u.ru_stime],open(sys.argv[1],'w'))"
)


@dataclass(frozen=True, slots=True)
class Measured:
    """Cost of a run.

    `processor_seconds`: of the operator's programs and all hosts. `mebibytes`: of the operator's
    largest process.
    """

    seconds: float
    mebibytes: float
    processor_seconds: float


def measured(lab: Lab, folder: Path, *command: str | Path) -> Measured:
    """Return the cost of a command, which must succeed."""
    result, before = folder / "measured.json", _processor_seconds(lab)
    lab.operator(sys.executable, "-c", MEASURED, result, *command, timeout=RUN_SECONDS)
    code, seconds, mebibytes, own = json.loads(result.read_text())
    if code:
        raise SystemExit(
            f"{command[0]} ended with code {code}:\n{Path(f'{result}.log').read_text()[-3000:]}"
        )
    return Measured(seconds, mebibytes, own + _processor_seconds(lab) - before)


def _processor_seconds(lab: Lab) -> float:
    """Return the processor seconds that all hosts have used since they were switched on."""
    files = [
        group / "cpu.stat" for host in lab.hosts for group in cgroups.folders(lab.name, host.name)
    ]
    return sum(int(file.read_text().split()[1]) for file in files if file.exists()) / 1e6


def write_inventory(lab: Lab, folder: Path) -> Path:
    names = [(host.name, {"ssh_hostname": host.address}) for host in lab.hosts]
    file = folder / "fleet.py"
    file.write_text(
        "from lab.access import operator_access\n"
        f"workers = {names!r}\n"
        f"all = ({[name for name, _ in names]!r}, {{**operator_access(), **{DATA!r}}})\n"
    )
    return file


def _base_tasks(folder: Path) -> list[dict[str, Any]]:
    packages = " ".join(system.PACKAGES)
    apt = "DEBIAN_FRONTEND=noninteractive apt-get -qq -y"
    install = f"{apt} update && {apt} --no-install-recommends install {packages}"
    folders = {
        "/opt/hivewright": "755",
        str(RELEASES): "755",
        "/opt/hivewright/environments": "755",
        "/var/lib/hivewright": "755",
        "/etc/hivewright": "755",
    }
    user = {
        "name": paths.USER,
        "system": True,
        "home": "/var/lib/hivewright",
        "shell": "/usr/sbin/nologin",
        "create_home": False,
    }
    command = {
        "src": str(folder / "hivewright"),
        "dest": "/usr/local/bin/hivewright",
        "mode": "755",
    }
    return [
        {
            "name": "Packages",
            "shell": f"dpkg-query -W {packages} >/dev/null 2>&1 || {{ {install}; echo changed; }}",
            "register": "installed",
            "changed_when": "'changed' in installed.stdout",
        },
        {"name": "User", "user": user},
        *(
            {"name": f"Make {path}", "file": {"path": path, "state": "directory", "mode": mode}}
            for path, mode in folders.items()
        ),
        {"name": "Command", "copy": command},
    ]


def _release_tasks(here: Path) -> list[dict[str, Any]]:
    build = f"{release.environment_script(here, None)} && ln -sfn $folder {here}/environment"
    checkout = {"repo": REPOSITORY_URL, "dest": str(here), "version": here.name}
    return [
        {"name": "Checkout", "git": checkout},
        {"name": "Environment", "shell": build, "args": {"creates": f"{here}/environment"}},
    ]


def _slot_tasks(slot: Slot, folder: Path, here: Path) -> list[dict[str, Any]]:
    state = slot.settings.node.state_dir
    run = f"runuser -u {paths.USER} -- environment/bin/python -m worker"
    is_changed = "unit.changed or settings.changed or current.changed"
    state_folder = {
        "path": str(state),
        "state": "directory",
        "owner": paths.USER,
        "group": paths.USER,
        "mode": "700",
    }
    service = {
        "name": slot.unit,
        "enabled": True,
        "daemon_reload": "{{ unit.changed }}",
        "state": f"{{{{ 'restarted' if {is_changed} else 'started' }}}}",
    }
    return [
        {
            "name": "Settings",
            "copy": {"src": str(folder / "worker-0.yaml"), "dest": str(slot.file), "mode": "644"},
            "register": "settings",
        },
        {
            "name": "Check them",
            "command": f"{run} check --settings {slot.file}",
            "args": {"chdir": str(here)},
            "when": "settings.changed",
        },
        {
            "name": "Current",
            "file": {"src": str(here), "dest": str(CURRENT), "state": "link"},
            "register": "current",
        },
        {"name": "State", "file": state_folder},
        {
            "name": "Unit",
            "copy": {"src": str(folder / "worker.service"), "dest": str(paths.UNITS / WORKER_UNIT)},
            "register": "unit",
        },
        {
            "name": "Enrol",
            "command": f"{run} enrol --settings {slot.file}",
            "args": {"chdir": str(here), "creates": f"{state}/enrolment.json"},
        },
        {"name": "Service", "systemd_service": service},
    ]


def write_playbook(lab: Lab, folder: Path, commit: str) -> Path:
    """Return an Ansible playbook with the same tasks, written idiomatically."""
    plan = validation.check([HostEntry("h1", ("workers",), DATA)])["h1"]
    slot = plan.slots[0]
    (folder / "worker-0.yaml").write_text(units.settings_text(slot.settings))
    (folder / "worker.service").write_text(
        units.render(WORKER_UNIT, SYSTEMD, plan.deployment.watchdog_seconds)
    )
    (folder / "hivewright").write_text(system.WRAPPER)
    here = RELEASES / commit
    tasks = [*_base_tasks(folder), *_release_tasks(here), *_slot_tasks(slot, folder, here)]
    file = folder / "play.yaml"
    file.write_text(
        yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": tasks}], sort_keys=False)
    )
    ssh = (
        f"-o UserKnownHostsFile={lab.folder}/known_hosts -o ControlMaster=auto -o"
        " ControlPersist=600s"
    )
    lines = [
        f"{host.name} ansible_host={host.address} ansible_user=root"
        f" ansible_ssh_private_key_file={lab.folder}/id ansible_python_interpreter=/usr/bin/python3"
        for host in lab.hosts
    ]
    (folder / "hosts.ini").write_text("\n".join(lines) + "\n")
    (folder / "ansible.cfg").write_text(
        f"[defaults]\nforks = {len(lab.hosts)}\n[ssh_connection]\npipelining = True\nssh_args ="
        f" {ssh}\n"
    )
    return file


def freeze(host: Host) -> None:
    host.ssh("systemctl kill --signal=STOP --kill-whom=main hivewright-worker@0.service")


def roll_out(lab: Lab, folder: Path, inventory: Path) -> dict[str, Any]:
    """Roll out a code change to every host; return the report and the seconds it took."""
    text = (CHECKOUT / "worker/__init__.py").read_text()
    lab.branch("lab-next", "worker/__init__.py", text + "\n# The next release.\n")
    changed = folder / "next.py"
    changed.write_text(inventory.read_text() + 'all[1]["release_ref"] = "lab-next"\n')
    output = folder / "rollout"
    is_over = threading.Event()
    freezer = threading.Thread(
        target=_freeze_when_done, args=(lab, output / "report.json", is_over)
    )
    freezer.start()
    program = (
        sys.executable,
        "-m",
        "worker",
        "rollout",
        changed,
        "--batch",
        "2",
        "--output",
        output,
    )
    try:
        seconds = measured(lab, folder, *program).seconds
    finally:
        is_over.set()
        freezer.join()
    return {"seconds": seconds, **json.loads((output / "report.json").read_text())}


def _freeze_when_done(lab: Lab, file: Path, is_over: threading.Event) -> None:
    frozen: set[str] = set()
    while not is_over.wait(1):
        report = json.loads(file.read_text()) if file.exists() else {"hosts": {}}
        for host in lab.hosts:
            if host.name not in frozen and report["hosts"].get(host.name, {}).get("fate") == "done":
                frozen.add(host.name)
                freeze(host)


def compare(num_hosts: int, repeats: int, ansible: Path, has_rollout: bool) -> dict[str, Any]:
    """Return the first run's seconds, and medians and peak memory of runs without a change."""
    figures: dict[str, Any] = {}
    for tool in ("ours", "reference"):
        lab = Lab("labbench")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                lab.up(num_hosts, goes_with_this_process=True)
                commit = lab.publish()
                command: Sequence[str | Path]
                if tool == "ours":
                    inventory = write_inventory(lab, folder)
                    command = (sys.executable, "-m", "pyinfra", "-y", inventory, "deploy.py")
                else:
                    play = write_playbook(lab, folder, commit)
                    environment = (
                        "env",
                        f"ANSIBLE_CONFIG={folder}/ansible.cfg",
                        f"ANSIBLE_HOME={folder}/home",
                    )
                    command = (
                        *environment,
                        ansible / "bin/ansible-playbook",
                        "-i",
                        folder / "hosts.ini",
                        play,
                    )
                first = measured(lab, folder, *command).seconds
                for host in lab.hosts:
                    freeze(host)
                again = [measured(lab, folder, *command) for _ in range(repeats)]
                if tool == "ours" and has_rollout:
                    figures["rollout"] = roll_out(lab, folder, inventory)
            finally:
                lab.down()
        figures[tool] = {
            "first": first,
            "again": statistics.median(run.seconds for run in again),
            "processor": statistics.median(run.processor_seconds for run in again),
            "memory": max(run.mebibytes for run in again),
        }
        shown = ", ".join(f"{key} {value:.1f}" for key, value in figures[tool].items())
        print(f"{num_hosts} hosts, {tool}: {shown} (load {os.getloadavg()[0]:.0f})", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if reason := machine.why_no_lab():
        raise SystemExit(reason)
    claims: list[dict[str, Any]] = []
    seconds_again: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        ansible = Path(name) / "ansible"
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "venv", ansible], check=True)
        subprocess.run(
            [ansible / "bin/pip", "install", "--quiet", "--disable-pip-version-check", ANSIBLE],
            check=True,
            env={**os.environ, "PIP_NO_INPUT": "1"},
        )
        print(f"{ANSIBLE} installed in {time.monotonic() - began:.0f} s", flush=True)
        for num_hosts in options.hosts:
            found = compare(num_hosts, options.repeats, ansible, num_hosts == max(options.hosts))
            seconds_again[num_hosts] = {
                tool: found[tool]["again"] for tool in ("ours", "reference")
            }
            for key, what, unit in (
                ("first", "first deploy of bare hosts", "s"),
                ("again", "second deploy, nothing to change", "s"),
                ("processor", "second deploy, processor time of operator and hosts", "s"),
                ("memory", "largest process of the operator's, second deploy", "MiB"),
            ):
                ours, reference = found["ours"][key], found["reference"][key]
                claims.append(
                    {
                        "claim": f"{what}, {num_hosts} hosts",
                        "ours": ours,
                        "reference": reference,
                        "ratio": reference / ours,
                        "unit": unit,
                    }
                )
            if "rollout" in found:
                claims.append(_rollout_claim(found["rollout"], num_hosts))
    if len(seconds_again) > 1:
        claims.append(_slope(seconds_again))
    if options.json:
        options.json.write_text(json.dumps(claims, indent=2) + "\n")


def _rollout_claim(report: dict[str, Any], num_hosts: int) -> dict[str, Any]:
    fates = [host["fate"] for host in report["hosts"].values()]
    batches = max(host["batch"] for host in report["hosts"].values())
    seconds = report["seconds"]
    print(
        f"rollout of a code change: {fates.count('done')} of {num_hosts} hosts in {batches}"
        f" batches, {seconds:.0f} s"
    )
    return {
        "claim": f"rollout of a code change, {num_hosts} hosts in {batches} batches",
        "ours": seconds,
        "reference": None,
        "ratio": None,
        "unit": "s",
    }


def _slope(seconds: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Return the cost of one more host in a run that changes nothing."""
    least, most = min(seconds), max(seconds)
    each = {
        tool: (seconds[most][tool] - seconds[least][tool]) / (most - least)
        for tool in ("ours", "reference")
    }
    print(
        f"one more host, from {least} to {most}: ours {each['ours']:.2f} s, Ansible's"
        f" {each['reference']:.2f} s"
    )
    return {
        "claim": f"second deploy, one more host ({least} to {most})",
        **each,
        "ratio": each["reference"] / each["ours"],
        "unit": "s",
    }


if __name__ == "__main__":
    main()
