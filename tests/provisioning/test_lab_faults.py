"""A real host that is cut, frozen, switched off or rebooted during its rollout, and `--resume`.

h4 trains alone, so that a stage takes seconds. Each case leaves it training, with its own release.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.lab import Lab
from lab.lab_host import CHECKOUT, Host
from lab.process import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.nightly, pytest.mark.timeout(900)]

WORKER = "hivewright-worker@0.service"
INVENTORY = """
from lab.access import operator_access
from worker.environments.presets import DEMO_SETTINGS

workers = [("h4", {"ssh_hostname": "10.88.0.14", "slots": 1})]
alone = {"swarm_enabled": False, "release_ref": "BRANCH"}
all = (["h4"], {**operator_access(), **DEMO_SETTINGS, **alone})
"""
# What a host that is gone, or silent, may cost: connecting, silence, a look; and a gate that waits
# for it.
PATIENCE_SECONDS, GATE_SECONDS = 500.0, 240
STAGES = (
    "Check that it can be",
    "Release | Check out",
    "Keep what the host is",
    "Release | Make it the current",
    "Worker | Write worker-0.yaml",
    "Worker | Run slot 0",
    "Note that the host is whole",
)


class OneHost:
    """Rollouts of one host, each with its own commit."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.host, self._folder = lab, lab.host(4), folder
        self.output = folder / "rollout"
        self._num_commits = 0

    def next_release(self) -> str:
        self._num_commits += 1
        branch = f"fault-{self._num_commits}"
        commit = self.lab.branch(
            branch, "docs/next.md", f"Release {self._num_commits} of {self._folder}.\n"
        )
        (self._folder / "one.py").write_text(INVENTORY.replace("BRANCH", branch))
        return commit

    def rollout(self, *more: str) -> "subprocess.Popen[str]":
        program = (
            sys.executable,
            "-m",
            "worker",
            "rollout",
            self._folder / "one.py",
            "--output",
            self.output,
        )
        command = self.lab.network.inside(*program, "--gate-seconds", str(GATE_SECONDS), *more)
        return subprocess.Popen(
            command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def to_the_end(self, *more: str) -> tuple[int, str]:
        running = self.rollout(*more)
        said = running.communicate(timeout=PATIENCE_SECONDS)[0]
        return running.returncode, said

    def wait_for(self, stage: str) -> None:
        log = self.output / "h4.log"
        wait_until(
            lambda: log.exists() and stage in log.read_text(),
            180,
            f"the rollout is at {stage!r}",
            0.05,
        )

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.output / "report.json").read_text())
        return report

    def is_deployed(self, commit: str) -> bool:
        """Return whether the rollout of that commit has reached the gate."""
        of = self.report["hosts"]["h4"]
        return of["commit"] == commit and of["num_changes"] > 0

    @property
    def commit(self) -> str:
        return self.host.ssh("basename $(readlink /opt/hivewright/current)").stdout.strip()

    def require_whole(self, commit: str) -> None:
        """Assert that the host has this release completely, trains, and kept its identity."""
        assert self.commit == commit
        leftover = (
            "ls -d /opt/hivewright/releases/.partial /etc/hivewright/*.new"
            " /etc/systemd/system/*.new"
        )
        assert self.host.ssh(f"{leftover} 2>/dev/null", check=False).stdout == ""
        assert self.host.ssh("cat /var/lib/hivewright/deployed/host").stdout.strip()
        before = _rounds(self.host)
        wait_until(lambda: _rounds(self.host) > before, 90, "h4 trains", 0.5)


def _rounds(host: Host) -> int:
    return len((host.root / "var/lib/hivewright/worker-0/rounds.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def one(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> OneHost:
    one = OneHost(lab, tmp_path_factory.mktemp("one"))
    commit = one.next_release()
    code, said = one.to_the_end()
    assert code == 0, said
    one.require_whole(commit)
    return one


def _reboot(host: Host) -> None:
    host.ssh("systemctl reboot --force --force", check=False)


# How a host is lost, and how it comes back.
FAULTS: dict[str, tuple[Callable[[Host], None], Callable[[Lab], None]]] = {
    "switched-off": (Host.pull_plug, lambda lab: lab.start(4)),
    "frozen": (Host.freeze, lambda lab: lab.host(4).thaw()),
    "cut": (Host.cut, lambda lab: lab.host(4).heal()),
    "rebooted": (_reboot, lambda lab: lab.host(4).wait_for_ssh()),
}
CASES = [("switched-off", stage) for stage in STAGES] + [
    ("frozen", STAGES[1]),
    ("frozen", STAGES[5]),
    ("cut", STAGES[2]),
    ("cut", STAGES[5]),
    ("rebooted", STAGES[3]),
]


@pytest.mark.parametrize(("fault", "stage"), CASES)
def test_host_lost_at_any_stage_is_left_behind_in_time_and_resume_makes_it_whole(
    one: OneHost, fault: str, stage: str
) -> None:
    lose, bring_back = FAULTS[fault]
    key = one.host.ssh("sha256sum /var/lib/hivewright/worker-0/swarm.pem").stdout
    commit = one.next_release()
    (one.output / "h4.log").unlink(missing_ok=True)
    running = one.rollout()
    try:
        one.wait_for(stage)
        lose(one.host)
        said = running.communicate(timeout=PATIENCE_SECONDS)[0]
    finally:
        running.kill()
        bring_back(one.lab)
    if running.returncode == 0:
        # It was through with it, or the host was back in time.
        assert one.report["hosts"]["h4"]["fate"] == "done"
    else:
        assert running.returncode == 1, said
        assert one.report["hosts"]["h4"]["fate"] in (
            "unreachable",
            "failed",
            "overdue",
            "lost",
        ), said
        assert "--resume" in said
        code, said = one.to_the_end("--resume")
        assert code == 0, said
    one.require_whole(commit)
    assert one.host.ssh("sha256sum /var/lib/hivewright/worker-0/swarm.pem").stdout == key


@pytest.mark.parametrize("stage", [STAGES[1], STAGES[5], "gate"])
def test_rollout_that_is_interrupted_says_how_to_go_on_and_does(one: OneHost, stage: str) -> None:
    commit = one.next_release()
    (one.output / "h4.log").unlink(missing_ok=True)
    running = one.rollout()
    try:
        if stage == "gate":
            wait_until(lambda: one.is_deployed(commit), 200, "h4 is deployed", 0.1)
        else:
            one.wait_for(stage)
        began = time.monotonic()
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=30)[0]
    finally:
        running.kill()
    assert running.returncode == 130, said
    assert time.monotonic() - began < 15
    assert "`hivewright rollout --resume" in said
    assert one.report["result"] == "interrupted"
    assert one.report["hosts"]["h4"]["fate"] == "pending"
    code, said = one.to_the_end("--resume")
    assert code == 0, said
    one.require_whole(commit)


def test_full_disk_is_named_and_nothing_changes(one: OneHost) -> None:
    before, pid = (
        one.commit,
        one.host.ssh(f"systemctl show --property=MainPID --value {WORKER}").stdout,
    )
    commit = one.next_release()
    releases = "/opt/hivewright/releases"
    kept = f"cp -a {releases} /root/kept && size=$(du -sk /root/kept | cut -f 1)"
    one.host.ssh(
        f"{kept} && mount -t tmpfs -o size=$((size + 400))k disk {releases} && cp -a /root/kept/."
        f" {releases}/"
    )
    try:
        code, said = one.to_the_end()
        assert code == 1, said
        assert one.report["hosts"]["h4"]["fate"] == "failed"
        assert "No space left on device" in one.report["hosts"]["h4"]["reason"]
        assert one.commit == before
        assert one.host.ssh(f"systemctl show --property=MainPID --value {WORKER}").stdout == pid
    finally:
        one.host.ssh(f"umount --lazy {releases}; rm -rf /root/kept")
    code, said = one.to_the_end("--resume")
    assert code == 0, said
    one.require_whole(commit)
