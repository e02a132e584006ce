"""Run pyinfra as a separate program, since its CLI patches the process that it runs in.

A rollout runs one such program per host, so that each has its own deadline and none waits for
another.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from deploys.inventory.file_checks import whole_path
from deploys.pyinfra_ext import report_file
from deploys.pyinfra_ext.report_file import HostRun, RunReport
from worker.errors import SettingsError, WorkerError

CHECKOUT = Path(__file__).parents[2]
PYINFRA = (sys.executable, "-m", "pyinfra")
Outcome = Literal["done", "unreachable", "overdue", "failed"]


@dataclass(frozen=True, slots=True)
class Ran:
    """The result of a run on one host.

    `reason`: why it is not `done`, or what the deployed host lacks. `num_changes`: number of
    operations that changed something.
    """

    outcome: Outcome
    reason: str = ""
    num_changes: int = 0


@dataclass(frozen=True, slots=True)
class Answers:
    """For each requested fact, its value by host, without hosts whose answer is incomplete.

    `reasons`: why hosts gave no answer, as pyinfra reports it.
    """

    values: list[dict[str, Any]]
    reasons: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Done:
    """A pyinfra process that has ended; `code` is None if it was killed at its time limit."""

    code: int | None
    stdout: str
    stderr: str
    report: RunReport


class Stopped(WorkerError):
    """The operator interrupted the operation."""


class Late(WorkerError):
    """pyinfra did not end in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"pyinfra had not ended after {seconds:g} s and was stopped; run it again")
        self.seconds = seconds


@dataclass
class Pyinfra:
    """pyinfra for one inventory.

    `prefix`: command line that pyinfra's own is appended to (`ip netns exec ...`). `held`: file
    descriptors that stay open while any of its programs runs, even if this process is killed.
    `plans`: folder to which a listing of hosts to be deployed writes their plans, so that later
    deploys need not check the whole inventory again. `breaks_locks`: take a host's lock
    (deploys/locks.py) even if somebody has it.
    """

    inventory: str
    prefix: Sequence[str] = ()
    held: Sequence[int] = ()
    breaks_locks: bool = False
    plans: Path | None = None
    _running: set["subprocess.Popen[str]"] = field(default_factory=set, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _is_stopped: bool = field(default=False, init=False, repr=False)

    @classmethod
    def of_operator(
        cls,
        inventory: str,
        prefix: Sequence[str] = (),
        held: Sequence[int] = (),
    ) -> "Pyinfra":
        """Return an instance for an inventory file. Raises SettingsError if it is not a file."""
        return cls(whole_path(inventory), prefix, held)

    def hosts(
        self,
        *,
        timeout: float,
        is_to_be_deployed: bool = False,
    ) -> list[dict[str, Any]]:
        """Return the hosts of the inventory with `name`, `groups` and `data`; connects to none.

        Prints warnings about data that a deploy would refuse. Raises SettingsError with pyinfra's
        message if there is no such inventory or it has no hosts, and, if it `is_to_be_deployed`,
        with every mistake of any host.
        """
        if not (CHECKOUT / "deploy.py").is_file():
            raise SettingsError(
                f"{CHECKOUT}: no deploy.py; run it with the `hivewright` of a checkout's .venv"
            )
        # pyinfra has no use for deploy.py there, but config.py then checks all that it would be run
        # with.
        checked = ["deploy.py"] if is_to_be_deployed else []
        done = self._run(["--json", self.inventory, "debug-inventory", *checked], timeout)
        listed: list[dict[str, Any]] = _parsed(done, timeout)
        for line in done.report.warnings:
            print(line, file=sys.stderr, flush=True)
        if not listed:
            raise SettingsError(
                f"{self.inventory}: no hosts; expected lists of hosts, named coordinators and"
                " workers"
            )
        return listed

    def facts(
        self,
        *arguments: str,
        hosts: Sequence[str],
        timeout: float,
        data: Mapping[str, str] | None = None,
    ) -> Answers:
        """Return the hosts' answers to each fact (`module.Class key=value ...`).

        `data`: overrides the hosts' own data. Raises Late if it takes longer than `timeout`.
        """
        options = ["--json"]
        for host in hosts:
            options += ["--limit", host]
        for key, value in (data or {}).items():
            options += ["--data", f"{key}={value}"]
        done = self._run([*options, self.inventory, "fact", *arguments], timeout)
        # A host without a record was not reached.
        reached = done.report.hosts
        runs = {host: reached.get(host, HostRun(state="done")) for host in hosts}
        if done.code and all(run.state != "done" for run in runs.values()):
            values: list[dict[str, Any]] = [{} for argument in arguments if "=" not in argument]
        else:
            values = [_without_none(found) for found in _parsed(done, timeout).values()]
        silent = [host for host in hosts if any(host not in found for found in values)]
        return Answers(values, {host: runs[host].output or "no whole answer" for host in silent})

    def deploy(
        self,
        host: str,
        commit: str | None,
        log: Path,
        *,
        timeout: float,
    ) -> Ran:
        """Deploy one host with this commit; None: the commit in its data. Output goes to `log`.

        Raises SettingsError if the inventory is refused; then no host was touched.
        """
        pinned = ["--data", f"release_ref={commit}"] if commit else []
        return self._on_host(host, [*pinned, self.inventory, "deploy.py"], log, timeout)

    def operation(
        self,
        host: str,
        name: str,
        log: Path,
        *arguments: str,
        timeout: float,
        stdin: str | None = None,
    ) -> Ran:
        """Run one operation (`module.name key=value ...`) on one host."""
        return self._on_host(host, [self.inventory, name, *arguments], log, timeout, stdin)

    def stop(self) -> None:
        """End all running programs after an interruption; their callers get Stopped."""
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                _kill(process)

    def _on_host(
        self,
        host: str,
        arguments: Sequence[str],
        log: Path,
        timeout: float,
        stdin: str | None = None,
    ) -> Ran:
        """Run pyinfra on one host; its output goes to `log` as it comes."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a+") as stream:
            began = stream.tell()
            done = self._run([*self._for_one(host), *arguments], timeout, stdin, stream)
            stream.seek(began)
            done = replace(done, stderr=stream.read())
        run = done.report.hosts.get(host, HostRun())
        if done.code is None:
            was_at = f"it was at: {run.operation}" if run.operation else "it was connecting"
            return Ran("overdue", f"not done after {timeout:g} s, stopped; {was_at}")
        if done.code == SettingsError.exit_code:
            raise SettingsError(_refusal(done))
        if done.code == 0 or (run.state == "done" and run.lacking):
            results = _parsed(done, timeout)["results"]
            num_changes = int(results["totals"]["success"])
            return Ran("done", "; ".join(run.lacking), num_changes)
        if run.state == "unreachable":
            reason = "can't be reached"
            return Ran("unreachable", f"{reason}: {run.output}" if run.output else reason)
        return Ran("failed", done.report.stopped or run.reason or _last_line(done))

    def _for_one(self, host: str) -> list[str]:
        """Return the options of a run that changes one host."""
        return [
            "-y",
            "--json",
            "--limit",
            host,
            *(["--data", "break_lock=true"] if self.breaks_locks else []),
        ]

    def _run(
        self,
        arguments: Sequence[str],
        timeout: float,
        stdin: str | None = None,
        stderr: IO[str] | None = None,
    ) -> _Done:
        """Run pyinfra in its own session, so that its children (ssh by a jump host) end too."""
        with tempfile.TemporaryDirectory(prefix="hivewright-run-") as folder:
            file = Path(folder) / "report.json"
            process = self._start(arguments, stdin is not None, stderr, file)
            try:
                out, err = process.communicate(stdin, timeout=timeout)
                code: int | None = process.returncode
            except subprocess.TimeoutExpired:
                out, err, code = "", "", None
            finally:
                with self._lock:
                    self._running.discard(process)
                if process.poll() is None:
                    _kill(process)
                    process.communicate()
            if self._is_stopped:
                raise Stopped("stopped by the operator")
            return _Done(code, out, err or "", report_file.read(file))

    def _start(
        self,
        arguments: Sequence[str],
        has_input: bool,
        stderr: IO[str] | None,
        report: Path,
    ) -> "subprocess.Popen[str]":
        with self._lock:
            if self._is_stopped:
                raise Stopped("not started: stopped by the operator")
            process = subprocess.Popen(
                [*self.prefix, *PYINFRA, *arguments],
                cwd=CHECKOUT,
                env=self._environment(report),
                stdin=subprocess.PIPE if has_input else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if stderr is None else stderr,
                text=True,
                start_new_session=True,
                pass_fds=self.held,
            )
            self._running.add(process)
            return process

    def _environment(
        self,
        report: Path,
    ) -> dict[str, str]:
        own = {report_file.REPORT_VARIABLE: str(report)}
        if self.plans is not None:
            own[report_file.PLANS_VARIABLE] = str(self.plans)
        return {**os.environ, **own}


def heed_signals() -> None:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt, so that no pyinfra continues alone.

    A shell that starts this process with & would otherwise make it ignore Ctrl-C.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)


def deploy(
    inventory: str,
    *,
    prefix: Sequence[str] = (),
    timeout: float,
) -> int:
    """Run the whole deploy with pyinfra's output on this terminal; return its exit code."""
    command = [*prefix, *PYINFRA, "-y", inventory, "deploy.py"]
    try:
        return subprocess.run(command, cwd=CHECKOUT, timeout=timeout, check=False).returncode
    except subprocess.TimeoutExpired:
        raise Late(timeout) from None


def deploy_json(
    inventory: str,
    *,
    prefix: Sequence[str] = (),
    timeout: float,
) -> dict[str, Any]:
    """Run the whole deploy; return pyinfra's results: operations, totals, failed hosts."""
    done = Pyinfra(inventory, prefix)._run(["-y", "--json", inventory, "deploy.py"], timeout)
    return dict(_parsed(done, timeout)["results"])


def _without_none(found: Mapping[str, Any]) -> dict[str, Any]:
    return {host: value for host, value in found.items() if value is not None}


def _parsed(done: _Done, timeout: float) -> Any:
    """Return the JSON that pyinfra printed. Raises Late, SettingsError, or WorkerError."""
    if done.code is None:
        raise Late(timeout)
    try:
        return json.loads(done.stdout)
    except ValueError:
        if done.code == SettingsError.exit_code:
            raise SettingsError(_refusal(done)) from None
        raise WorkerError(done.report.stopped or _last_line(done)) from None


def _refusal(done: _Done) -> str:
    """Return the mistakes in an inventory, one per line."""
    return "\n".join(done.report.refused) or _last_line(done)


def _last_line(done: _Done) -> str:
    """Return the last line of a pyinfra that has left no report."""
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return said[-1] if said else f"pyinfra ended with code {done.code} and said nothing"


def _kill(process: "subprocess.Popen[str]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
