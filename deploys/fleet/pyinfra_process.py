"""Running pyinfra as a program of its own: its CLI patches the process that it runs in.

A rollout runs one such program per host, so that each has a deadline of its own and none waits for another.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from deploys.inventory.file_checks import WARNING, whole_path
from deploys.pyinfra_ext.run_report import DONE_BUT
from worker.errors import SettingsError, WorkerError

CHECKOUT = Path(__file__).parents[2]
PYINFRA = (sys.executable, "-m", "pyinfra")
# What deploys/pyinfra_ext/run_report.py says of a host that there was no connection to.
UNREACHED = "can't be reached"

# Lines of pyinfra's, and of systemd's about a service that did not start; what that itself said stands among them.
_SAYS_LITTLE = (
    "Error", "Connected", "Ready", "Success", "No change", "hivewright-", "Starting ", "Started ", "Stopped ",
    "Failed to", "Job for ", "See ", "Loaded fact",
    "still at it",  # deploys/pyinfra_ext/fact_cache.py
)  # fmt: skip

DISK_FULL = "No space left on device"

Outcome = Literal["done", "unreachable", "overdue", "failed"]


@dataclass(frozen=True, slots=True)
class Ran:
    """How a run on one host ended: `reason` says why it did not get `done`, or what it was done without.

    `num_changes`: operations that changed.
    """

    outcome: Outcome
    reason: str = ""
    num_changes: int = 0


@dataclass(frozen=True, slots=True)
class Answers:
    """For each fact that was asked for its value by host, without hosts that gave no whole answer.

    `reasons`: why hosts gave none, as pyinfra says it.
    """

    values: list[dict[str, Any]]
    reasons: dict[str, str]


class Stopped(WorkerError):
    """The operator has asked for the end meanwhile."""


@dataclass
class Pyinfra:
    """pyinfra, for one inventory. `prefix`: the command line that its own is appended to (`ip netns exec ...`).

    `held`: file descriptors that stay open as long as any of its programs runs, even if this one was killed.
    `breaks_locks`: whether it takes a host's lock (deploys/locks.py) even if somebody has it.
    """

    inventory: str
    prefix: Sequence[str] = ()
    held: Sequence[int] = ()
    breaks_locks: bool = False
    _running: set["subprocess.Popen[str]"] = field(default_factory=set, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _is_stopped: bool = field(default=False, init=False, repr=False)

    @classmethod
    def of_operator(cls, inventory: str, prefix: Sequence[str] = (), held: Sequence[int] = ()) -> "Pyinfra":
        """For an inventory as an operator names it, from whichever folder. Raises SettingsError if it is no file."""
        return cls(whole_path(inventory), prefix, held)

    def hosts(self, *, timeout: float, is_to_be_deployed: bool = False) -> list[dict[str, Any]]:
        """Every host of the inventory with `name`, `groups` and `data`, in its order. Connects to none.

        What a deploy would refuse of their data is printed: what does without one goes on.

        Raises SettingsError with what pyinfra says if there is no such inventory, and if it has no hosts; if it
        `is_to_be_deployed`, with every mistake of any host too, as a deploy would.
        """
        if not (CHECKOUT / "deploy.py").is_file():
            raise SettingsError(f"{CHECKOUT}: no deploy.py; run it with the `hivewright` of a checkout's .venv")
        # pyinfra has no use for deploy.py there, but config.py then checks all that it would be run with.
        checked = ["deploy.py"] if is_to_be_deployed else []
        try:
            done = self._run(["--json", self.inventory, "debug-inventory", *checked], timeout)
        except subprocess.TimeoutExpired:
            raise _late(timeout) from None
        listed: list[dict[str, Any]] = _parsed(done)
        for line in done.stderr.splitlines():
            if line.startswith(WARNING):
                print(line, file=sys.stderr, flush=True)
        if not listed:
            raise SettingsError(f"{self.inventory}: no hosts; expected lists of hosts, named coordinators and workers")
        return listed

    def facts(
        self, *arguments: str, hosts: Sequence[str], timeout: float, data: Mapping[str, str] | None = None
    ) -> Answers:
        """What hosts answer to each fact (`module.Class key=value ...`). `data`: what counts instead of their own."""
        limits = [word for host in hosts for word in ("--limit", host)]
        instead = [word for key, value in (data or {}).items() for word in ("--data", f"{key}={value}")]
        done = self._run(["--json", *limits, *instead, self.inventory, "fact", *arguments], timeout)
        if "No hosts remaining" in done.stderr:
            by_fact: dict[str, dict[str, Any]] = {argument: {} for argument in arguments if "=" not in argument}
        else:
            by_fact = _parsed(done)
        values = [{host: value for host, value in found.items() if value is not None} for found in by_fact.values()]
        silent = [host for host in hosts if any(host not in found for found in values)]
        return Answers(values, {host: _complaint(host, done.stderr) or "no whole answer" for host in silent})

    def deploy(self, host: str, commit: str | None, log: Path, *, timeout: float) -> Ran:
        """Deploy one host, with that commit whatever its data say; None: as they say. pyinfra's output goes to `log`.

        Raises SettingsError if the inventory is refused; no host was touched then.
        """
        pinned = ["--data", f"release_ref={commit}"] if commit else []
        return self._on_host(host, [*pinned, self.inventory, "deploy.py"], log, timeout)

    def operation(
        self, host: str, name: str, log: Path, *arguments: str, timeout: float, stdin: str | None = None
    ) -> Ran:
        """Run one operation (`module.name key=value ...`) on one host."""
        return self._on_host(host, [self.inventory, name, *arguments], log, timeout, stdin)

    def stop(self) -> None:
        """End all programs that run, for an operator who has asked for the end; whoever waits for one gets Stopped."""
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                _kill(process)

    def _on_host(self, host: str, arguments: Sequence[str], log: Path, timeout: float, stdin: str | None = None) -> Ran:
        """What pyinfra says goes to `log` while it says it: an operator may look over its shoulder."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a+") as stream:
            began = stream.tell()
            try:
                done = self._run([*self._for_one(host), *arguments], timeout, stdin, stream)
            except subprocess.TimeoutExpired:
                stream.seek(began)
                return Ran("overdue", f"not done after {timeout:g} s and given up; {_doing(stream.read())}")
            stream.seek(began)
            done.stderr = stream.read()
        if done.returncode == SettingsError.exit_code:
            raise SettingsError(_refusal(done))
        last = _last_line(done)
        if done.returncode == 0 or last.startswith(DONE_BUT):
            num_changes = int(_parsed(done)["results"]["totals"]["success"])
            return Ran("done", last if done.returncode else "", num_changes)
        reason = last.removeprefix(f"failed: {host} (").split("); fix that")[0]
        if UNREACHED in last:
            return Ran("unreachable", reason)
        complaint = _complaint(host, done.stderr)
        return Ran("failed", f"{reason}: {complaint}" if complaint else reason)

    def _for_one(self, host: str) -> list[str]:
        """Options of a run that changes one host."""
        return ["-y", "--json", "--limit", host, *(["--data", "break_lock=true"] if self.breaks_locks else [])]

    def _json(self, arguments: Sequence[str], timeout: float) -> Any:
        try:
            return _parsed(self._run(arguments, timeout))
        except subprocess.TimeoutExpired:
            raise _late(timeout) from None

    def _run(
        self, arguments: Sequence[str], timeout: float, stdin: str | None = None, stderr: IO[str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """In a session of its own, so that everything that pyinfra starts (ssh through a jump host) ends with it."""
        with self._lock:
            if self._is_stopped:
                raise Stopped("not begun: the operator has asked for the end")
            process = subprocess.Popen(
                [*self.prefix, *PYINFRA, *arguments],
                cwd=CHECKOUT,
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if stderr is None else stderr,
                text=True,
                start_new_session=True,
                pass_fds=self.held,
            )
            self._running.add(process)
        try:
            out, err = process.communicate(stdin, timeout=timeout)
        finally:
            with self._lock:
                self._running.discard(process)
            if process.poll() is None:
                _kill(process)
                process.communicate()
        if self._is_stopped:
            raise Stopped("ended: the operator has asked for the end")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def heed_signals() -> None:
    """Have SIGINT and SIGTERM end this process as Ctrl-C does, so that no pyinfra goes on without it.

    Also where a shell has started it with &, which would have it ignore Ctrl-C.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)


def deploy(inventory: str, *, prefix: Sequence[str] = (), timeout: float) -> int:
    """Run the whole deploy, with pyinfra's own output on this terminal; return its exit code."""
    command = [*prefix, *PYINFRA, "-y", inventory, "deploy.py"]
    try:
        return subprocess.run(command, cwd=CHECKOUT, timeout=timeout, check=False).returncode
    except subprocess.TimeoutExpired:
        raise _late(timeout) from None


def deploy_json(inventory: str, *, prefix: Sequence[str] = (), timeout: float) -> dict[str, Any]:
    """Run the whole deploy; return pyinfra's results: operations with their hosts, totals, failed hosts."""
    results: dict[str, Any] = Pyinfra(inventory, prefix)._json(["-y", "--json", inventory, "deploy.py"], timeout)
    return dict(results["results"])


def _late(timeout: float) -> WorkerError:
    return WorkerError(f"pyinfra had not ended after {timeout:g} s and was stopped; run it again")


def _parsed(done: "subprocess.CompletedProcess[str]") -> Any:
    try:
        return json.loads(done.stdout)
    except ValueError:
        if done.returncode == SettingsError.exit_code:
            raise SettingsError(_refusal(done)) from None
        raise WorkerError(_last_line(done)) from None


def _refusal(done: "subprocess.CompletedProcess[str]") -> str:
    """Every line about what is wrong with an inventory, without those about what pyinfra was doing."""
    said = [line.rstrip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("--> ")]
    return "\n".join(said) or _last_line(done)


def _last_line(done: "subprocess.CompletedProcess[str]") -> str:
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return said[-1] if said else f"pyinfra ended with code {done.returncode} and said nothing"


def _complaint(host: str, stderr: str) -> str:
    """The last that the host itself said before pyinfra called it an error, or that its disk is full."""
    lines = [line.strip().removeprefix(f"[{host}]").strip() for line in stderr.splitlines() if f"[{host}]" in line]
    words = [line for line in lines if line and not line.startswith(_SAYS_LITTLE)]
    full = [line for line in words if DISK_FULL in line]
    return (full or words or [""])[-1]


def _doing(stderr: str) -> str:
    started = [line for line in stderr.splitlines() if "Starting operation: " in line]
    return f"it was at: {started[-1].partition('Starting operation: ')[2].strip()}" if started else "it was connecting"


def _kill(process: "subprocess.Popen[str]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
