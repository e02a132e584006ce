"""One host of the lab: Debian with systemd, sshd, cgroups and network in systemd-nspawn."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lab import cgroups, launcher, layers
from lab.lab_network import Network, host_address
from lab.process import LabError, recall, run, start, stop, wait_until

CHECKOUT = Path(__file__).parents[1]
BOOT_SECONDS = 60
# What systemd in a host needs beyond nspawn's default: its own firewall rules and per-unit BPF
# filters.
CAPABILITIES = "CAP_NET_ADMIN,CAP_NET_RAW,CAP_BPF,CAP_PERFMON"


class Host:
    """Host `number` of the lab in `lab_folder`: h1 at 10.88.0.11, h2 at 10.88.0.12 ..."""

    def __init__(
        self,
        lab_folder: Path,
        network: Network,
        number: int,
    ) -> None:
        self.number = number
        self.name = f"h{number}"
        self.address = host_address(number)
        self.folder = lab_folder / "hosts" / self.name
        self.root = self.folder / "root"
        self._lab_folder = lab_folder
        self._network = network
        self._machine = f"{network.name}-{self.name}"

    def prepare(self, lower: Sequence[Path]) -> None:
        """Make the host's disk and its network; `stop` and `Network.remove` undo this."""
        self.folder.mkdir(parents=True)
        layers.mount_overlay(lower, self.folder / "upper", self.root)
        key = self.folder / "host_key"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", key)
        target = self.root / "etc/ssh/ssh_host_ed25519_key"
        shutil.copy(key, target)
        target.chmod(0o600)
        shutil.copy(key.with_suffix(".pub"), target.with_suffix(".pub"))
        authorized = self.root / "root/.ssh/authorized_keys"
        authorized.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(self._lab_folder / "id.pub", authorized)
        authorized.chmod(0o600)
        (self.root / "etc/hostname").write_text(self.name + "\n")
        (self.root / "etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        public = key.with_suffix(".pub").read_text().split()[:2]
        with (self._lab_folder / "known_hosts").open("a") as known_hosts:
            known_hosts.write(f"{self.address} {' '.join(public)}\n")
        self._network.add_host(self.number)

    def start(
        self,
        binds: Sequence[str],
        owner: int | None,
    ) -> None:
        """Switch the host on. `binds` are read-only SOURCE:TARGET folders.

        `owner` is the read end of a pipe: the host is switched off when the pipe closes. None: it
        runs until `stop`.
        """
        nspawn = [
            "systemd-nspawn",
            "--quiet",
            f"--directory={self.root}",
            f"--machine={self._machine}",
            "--boot",
            "--register=no",
            "--keep-unit",
            f"--network-namespace-path=/run/netns/{self._network.host(self.number)}",
            "--resolv-conf=off",
            "--timezone=off",
            "--console=pipe",
            f"--capability={CAPABILITIES}",
            "--system-call-filter=bpf",
            "--bind=/dev/net/tun",
            *[f"--bind-ro={bind}" for bind in binds],
        ]
        own = cgroups.folders(self._network.name, self.name)
        for cgroup in own:
            cgroup.mkdir(parents=True, exist_ok=True)
        options = [f"--folder={self.folder}", *(f"--cgroup={cgroup}" for cgroup in own)]
        options += ["--while-stdin-open"] if owner is not None else []
        command = [sys.executable, "-m", "lab.launcher", *options, "--", *nspawn]
        stdin = subprocess.DEVNULL if owner is None else owner
        start(command, self.folder / "launcher.pid", self.folder / "console.log", stdin, CHECKOUT)

    def wait_for_ssh(self) -> None:
        def answers() -> bool:
            if recall(self.folder / "launcher.pid") is None:
                log = (self.folder / "console.log").read_text(errors="replace")[-1500:]
                raise LabError(f"{self.name} went off while it booted:\n{log}")
            try:
                return self.ssh("true", check=False, timeout=5).returncode == 0
            except LabError:  # the host boots, and has accepted the connection alone
                return False

        wait_until(
            answers, BOOT_SECONDS, f"{self.name} ({self.address}) answers over ssh", every=0.2
        )

    def ssh(
        self, script: str, check: bool = True, timeout: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell script on the host, as root."""
        command = self._network.inside(
            "ssh",
            "-q",
            "-n",
            "-o",
            "BatchMode=yes",
            "-o",
            "ConnectTimeout=3",
            "-o",
            f"UserKnownHostsFile={self._lab_folder / 'known_hosts'}",
            "-i",
            self._lab_folder / "id",
            f"root@{self.address}",
            script,
        )
        return run(*command, check=check, timeout=timeout)

    def cut(self) -> None:
        """Disconnect the network."""
        self._network.set_link(self.number, up=False)

    def heal(self) -> None:
        self._network.set_link(self.number, up=True)

    def freeze(self) -> None:
        """Freeze all processes, like a hanging machine; its kernel still acknowledges packets."""
        self._set_frozen(True)

    def thaw(self) -> None:
        self._set_frozen(False)

    def _set_frozen(self, is_frozen: bool) -> None:
        for group in cgroups.folders(self._network.name, self.name):
            switch = group / "cgroup.freeze"
            if switch.exists():
                switch.write_text("1" if is_frozen else "0")
                return
        raise LabError(f"{self.name} can't be frozen: no control group of version 2 here")

    def pull_plug(self) -> None:
        """Switch the host off like a power cut; `start` boots it again with the same disk."""
        nspawn = recall(self.folder / "nspawn.pid")
        if nspawn is None:
            raise LabError(f"{self.name} is not running")
        launcher.switch_off(nspawn)
        wait_until(lambda: recall(self.folder / "launcher.pid") is None, 15, f"{self.name} is off")

    def is_on(self) -> bool:
        return recall(self.folder / "launcher.pid") is not None

    def stop(self) -> None:
        """Switch the host off, and remove its mount and cgroups, including remains of a crash."""
        stop(self.folder / "launcher.pid")
        nspawn = recall(self.folder / "nspawn.pid")
        if nspawn is not None:
            launcher.switch_off(nspawn)
            stop(self.folder / "nspawn.pid")
        for cgroup in cgroups.folders(self._network.name, self.name):
            cgroups.remove(cgroup)
        if self.root.is_mount():
            run("umount", self.root)
        layers.forget_machine(self._machine)
