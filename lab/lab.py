"""A lab: a few real Debian hosts on this machine, reachable over ssh from an operator's namespace.

    lab = Lab("lab")
    lab.up(3)                                     # three hosts, ssh answers, nothing deployed
    lab.operator("pyinfra", "-y", "inventory/lab.py", "deploy.py", timeout=900)
    lab.host(2).ssh("systemctl is-system-running")
    lab.down()

Everything that belongs to a lab has its name: the folder /var/tmp/hivewright-lab/NAME, the network
namespaces NAME-*, the cgroups NAME. `down` uses these names, so it also removes the remains of a
crash, and nothing else.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lab import cgroups, layers
from lab.lab_host import CHECKOUT, Host
from lab.lab_network import OPERATOR_ADDRESS, Network
from lab.process import LabError, run, start, stop, wait_until

LABS = Path("/var/tmp/hivewright-lab")
REPOSITORY_URL = f"git://{OPERATOR_ADDRESS}/repository.git"


class Lab:
    """The lab called `name`, running or not; any process of root can use it."""

    def __init__(
        self,
        name: str,
        suite: str = layers.SUITE,
        is_bare: bool = False,
    ) -> None:
        """Describe a lab without starting it.

        `suite`: Debian's release. `is_bare`: only Debian, without the packages, the
        Python environment and the anvil that are prepared for a deploy.
        """
        self.name = name
        self._suite = suite
        self._is_bare = is_bare
        self.folder = LABS / name
        self.network = Network(name)
        # Read and write end of a pipe that closes when this process ends, however it ends. Then the
        # hosts are switched off.
        self._owner: int | None = None
        self._pipe: int | None = None
        self._claim: IO[str] | None = None

    @property
    def hosts(self) -> list[Host]:
        """The existing hosts, by number."""
        numbers = sorted(int(folder.name[1:]) for folder in (self.folder / "hosts").glob("h*"))
        return [self.host(number) for number in numbers]

    def host(self, number: int) -> Host:
        return Host(self.folder, self.network, number)

    def is_up(self) -> bool:
        return bool(self.hosts) and all(host.is_on() for host in self.hosts)

    def is_current(self) -> bool:
        """Return whether the hosts have the layers that the checkout needs."""
        file = self.folder / "layers"
        return file.exists() and file.read_text().splitlines() == [
            str(layer) for layer in self._layers()
        ]

    def up(self, num_hosts: int, goes_with_this_process: bool = False) -> None:
        """Boot `num_hosts` fresh hosts and serve the checkout to them; an existing lab is removed.

        `goes_with_this_process`: the hosts end with this process. Raises LabError if the lab
        belongs to another running process.
        """
        lower = self._layers()
        if goes_with_this_process:
            self._be_the_only_one()
        with self._lock():
            self._clear()
            self.folder.mkdir(parents=True, exist_ok=True)
            run(
                "ssh-keygen",
                "-q",
                "-t",
                "ed25519",
                "-N",
                "",
                "-C",
                f"{self.name}'s operator",
                "-f",
                self.folder / "id",
            )
            (self.folder / "layers").write_text("\n".join(map(str, lower)))
            self.network.make()
            if goes_with_this_process:
                self._owner, self._pipe = os.pipe()
            for number in range(1, num_hosts + 1):
                self.host(number).prepare(lower)
                self.host(number).start(self._binds(), self._owner)
            self.publish()
            self._serve()
            with ThreadPoolExecutor() as pool:
                list(pool.map(Host.wait_for_ssh, self.hosts))

    def start(self, number: int) -> None:
        """Switch a host on again after `pull_plug`."""
        self.host(number).start(self._binds(), self._owner)
        self.host(number).wait_for_ssh()

    def down(self) -> None:
        """Remove the lab with its processes, mounts, namespaces and folder; layers stay cached.

        Raises LabError if the lab belongs to another running process.
        """
        if self._claim is None:
            self._be_the_only_one()
        if self.folder.exists():
            with self._lock():
                self._clear()
            shutil.rmtree(self.folder)
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def publish(self) -> str:
        """Serve the checkout as branch `lab` of the lab's repository; return the commit.

        Without uncommitted changes it is HEAD; otherwise a commit of the files in the lab's
        repository, with fixed author and date, so that the same files give the same commit and a
        second deploy changes nothing.
        """
        repository = self.folder / "repository.git"
        git = ("git", f"--git-dir={repository}", "-c", "safe.directory=*")
        if not repository.exists():
            run("git", "init", "--quiet", "--bare", repository)
        if not run("git", "-C", CHECKOUT, "status", "--porcelain").stdout.strip():
            run(*git, "fetch", "--quiet", "--force", CHECKOUT, "HEAD:refs/heads/lab", timeout=120)
        else:
            run(*git, f"--work-tree={CHECKOUT}", "add", "--all", CHECKOUT, timeout=120)
            tree = run(*git, "write-tree").stdout.strip()
            dated = {
                f"GIT_{who}_{what}": value
                for who in ("AUTHOR", "COMMITTER")
                for what, value in (
                    ("NAME", "lab"),
                    ("EMAIL", "lab@localhost"),
                    ("DATE", "2026-01-01T00:00:00Z"),
                )
            }
            message = "Files of the checkout, uncommitted ones included"
            commit = run(
                *git, "commit-tree", tree, "-m", message, env={**os.environ, **dated}
            ).stdout.strip()
            run(*git, "update-ref", "refs/heads/lab", commit)
        return run(*git, "rev-parse", "refs/heads/lab").stdout.strip()

    def branch(
        self,
        name: str,
        path: str,
        content: str,
    ) -> str:
        """Serve the published files, with one replaced, as a branch; return its commit."""
        git = ("git", f"--git-dir={self.folder / 'repository.git'}", "-c", "safe.directory=*")
        own = {**os.environ, "GIT_INDEX_FILE": str(self.folder / f"index-{name}")}
        for who in ("AUTHOR", "COMMITTER"):
            own |= {f"GIT_{who}_NAME": "lab", f"GIT_{who}_EMAIL": "lab@localhost"}
        blob = run(*git, "hash-object", "-w", "--stdin", stdin=content).stdout.strip()
        run(*git, "read-tree", "lab", env=own)
        run(*git, "update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", env=own)
        tree = run(*git, "write-tree", env=own).stdout.strip()
        commit = run(*git, "commit-tree", tree, "-p", "lab", "-m", name, env=own).stdout.strip()
        run(*git, "update-ref", f"refs/heads/{name}", commit)
        return commit

    def operator(
        self, *argv: str | Path, timeout: float, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the operator's namespace, in the checkout, with this Python's PATH."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        command = self.network.inside("env", "-C", CHECKOUT, f"PATH={path}", *argv)
        return run(*command, timeout=timeout, check=check)

    def _be_the_only_one(self) -> None:
        """Claim the lab, since two test runs at a time would remove each other's hosts."""
        LABS.mkdir(parents=True, exist_ok=True)
        claim = (LABS / f"{self.name}.owner").open("w")
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            claim.close()
            raise LabError(
                f"the lab {self.name} belongs to another run of the tests on this machine; wait"
                " until that has ended"
            ) from None
        self._claim = claim

    def _serve(self) -> None:
        # The program itself: `git daemon` would be a parent that can be killed without its child.
        program = Path(run("git", "--exec-path").stdout.strip()) / "git-daemon"
        daemon = self.network.inside(
            program,
            f"--listen={OPERATOR_ADDRESS}",
            "--reuseaddr",
            "--export-all",
            f"--base-path={self.folder}",
            self.folder,
        )
        start(daemon, self.folder / "git-daemon.pid", self.folder / "git-daemon.log")

        def answers() -> bool:
            asked = self.operator(
                "git", "ls-remote", "--quiet", REPOSITORY_URL, "lab", timeout=10, check=False
            )
            return asked.returncode == 0

        wait_until(answers, 10, "the lab's git daemon answers")

    def _layers(self) -> list[Path]:
        """Return the layers of the hosts, topmost first."""
        if self._is_bare:
            return [layers.base(self._suite)]
        return [
            layers.anvil(CHECKOUT),
            layers.python_environment(CHECKOUT),
            layers.installed_packages(),
            layers.base(self._suite),
        ]

    def _binds(self) -> list[str]:
        return [f"{layers.packages(self._suite)}:/srv/apt"]

    def _clear(self) -> None:
        for daemon in self.folder.glob("*.pid"):
            stop(daemon)
        with ThreadPoolExecutor() as pool:
            list(pool.map(Host.stop, self.hosts))
        self.network.remove()
        for cgroup in cgroups.folders(self.name):
            cgroups.remove(cgroup)
        for entry in self.folder.glob("*"):
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LabError(
                    f"the lab {self.name} is being started or stopped by another process"
                ) from None
            yield
