"""`hivewright rollout INVENTORY`: a release goes to one host, then to a few, and on only while those get on with it.

Every host is deployed by a pyinfra of its own with a deadline of its own, so none holds up another. When the gate finds
that a batch does not train, everything that this rollout touched goes back to what it was. A host with a trouble of its
own (gone, hanging, full) is left behind, and `--resume` takes up exactly those.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploys import operator
from deploys.fleet import gate, report
from deploys.fleet.batches import Batch, Size, next_batch
from deploys.fleet.command import CHECKOUT, Pyinfra, Ran, heed_signals
from deploys.fleet.report import Fate, Report
from deploys.hosts import COORDINATORS
from worker.errors import ReleaseRefused, SettingsError, WorkerError
from worker.resources import lock_folder

ASK_SECONDS = 120.0
LOOK_EVERY_SECONDS = 5.0
GO_BACK_SECONDS = 600.0
# At most so many pyinfras at the same time: each takes about 80 MB.
NUM_PARALLEL = 16
# Deploys of the canary that may fail one after the other, before it is the release that is doubted.
NUM_CANARIES = 3

_FATES: Mapping[str, Fate] = {"unreachable": "unreachable", "overdue": "overdue", "failed": "failed"}


@dataclass(frozen=True, slots=True)
class Seen:
    """What a host says of itself: its HostState and its NodeReports, as dicts."""

    state: Mapping[str, Any]
    reports: Sequence[Mapping[str, Any]]


class Fleet(Protocol):
    """What a rollout asks of the hosts."""

    def deploy(self, host: str, commit: str) -> Ran:
        """Deploy one host with that commit."""

    def look(self, hosts: Sequence[str]) -> dict[str, Seen]:
        """What hosts say of themselves; those that can't be reached are not in it."""

    def go_back(self, host: str) -> Ran:
        """Have one host as it was before its last deploy."""

    def stop(self) -> None:
        """End what is under way; nobody waits for it any more."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How careful a rollout is. The gate waits at most `gate_seconds` until each worker of a batch has finished
    `gate_rounds` rounds."""

    size: Size
    gate_rounds: int
    gate_seconds: float
    look_every_seconds: float = LOOK_EVERY_SECONDS


class PyinfraFleet:
    """The hosts of an inventory, through pyinfra. What pyinfra says of each goes to `folder`/HOST.log."""

    def __init__(self, pyinfra: Pyinfra, folder: Path, deadline_seconds: float) -> None:
        self._pyinfra, self._folder, self._deadline_seconds = pyinfra, folder, deadline_seconds

    def deploy(self, host: str, commit: str) -> Ran:
        return self._pyinfra.deploy(host, commit, self._log(host), timeout=self._deadline_seconds)

    def look(self, hosts: Sequence[str]) -> dict[str, Seen]:
        """A look that itself hangs tells nothing of any host: they count as not reached, this time."""
        try:
            states, reports = self._pyinfra.facts(
                "deploys.facts.HostStates", "deploys.facts.NodeReports", hosts=hosts, timeout=ASK_SECONDS
            )
        except subprocess.TimeoutExpired:
            return {}
        return {host: Seen(states[host], reports[host]) for host in hosts if host in states and host in reports}

    def go_back(self, host: str) -> Ran:
        return self._pyinfra.operation(host, "deploys.history.go_back", self._log(host), timeout=GO_BACK_SECONDS)

    def stop(self) -> None:
        self._pyinfra.stop()

    def _log(self, host: str) -> Path:
        return self._folder / f"{host.strip('@').replace('/', '-')}.log"


class Rollout:
    """One rollout, as far as it has come. `save` is called with the report whenever it has changed."""

    def __init__(
        self,
        fleet: Fleet,
        rules: Rules,
        coordinators: Collection[str],
        so_far: Report,
        save: Callable[[Report], None],
        say: Callable[[str], None],
    ) -> None:
        self.report = so_far
        self._fleet, self._rules, self._coordinators = fleet, rules, coordinators
        self._save, self._say = save, say
        # What each host was before this rollout touched it.
        self._before: dict[str, Seen] = {}
        self._num_batches = max((host.batch or 0 for host in so_far.hosts.values()), default=0)

    def run(self) -> None:
        """Deploy all that is pending, batch by batch, to the end or until the gate closes."""
        self.report.result, self.report.finished_at = "running", None
        self._look_first()
        num_failed_canaries = 0
        while (batch := self._next()) is not None:
            self._num_batches += 1
            self._say(f"batch {self._num_batches} ({batch.kind}): {', '.join(batch.hosts)}")
            self._deploy(batch)
            reason = self._await_gate(batch)
            if reason is None and batch.kind == "canary" and self.report.hosts[batch.hosts[0]].fate == "failed":
                num_failed_canaries += 1
                if num_failed_canaries == NUM_CANARIES:
                    reason = f"{NUM_CANARIES} hosts in a row could not be deployed: {self._reason_of(batch)}"
            if reason is not None:
                self._go_back(reason)
                return
        left = self.report.those("unreachable", "overdue", "failed", "lost")
        self._finish("incomplete" if left else "done", "")

    def _next(self) -> Batch | None:
        bare = {name for name, seen in self._before.items() if seen.state["deployed"] is None}
        return next_batch(
            self.report.those("pending"), self.report.those("done"), self._coordinators, bare, self._rules.size
        )

    def _reason_of(self, batch: Batch) -> str:
        return self.report.hosts[batch.hosts[0]].reason

    def _look_first(self) -> None:
        """Hosts that don't answer now are not tried, and hold nobody up."""
        pending = self.report.those("pending")
        self._before = self._fleet.look(pending)
        for name in pending:
            if name in self._before:
                self.report.hosts[name].before = self._before[name].state["commit"]
            else:
                self._set(name, "unreachable", "no connection before anything was done")
        self._save(self.report)

    def _deploy(self, batch: Batch) -> None:
        """Deploy all hosts of the batch at the same time; their fates are then known, but for those that are up."""

        def deploy(name: str) -> None:
            began = time.monotonic()
            host = self.report.hosts[name]
            host.batch = self._num_batches
            ran = self._fleet.deploy(name, host.commit)
            host.seconds, host.num_changes = time.monotonic() - began, ran.num_changes
            if ran.outcome == "done":
                self._say(f"  {name}: deployed in {host.seconds:.0f} s, {ran.num_changes} changes")
            else:
                self._set(name, _FATES[ran.outcome], ran.reason)

        self._at_once(deploy, batch.hosts)
        self._save(self.report)

    def _await_gate(self, batch: Batch) -> str | None:
        """Wait until the hosts of the batch get on. Returns why the release is not let through; None: it is.

        Also hosts whose deploy failed half-way are watched: where the new release came to run and ends, it is the
        release. Where the old one runs on, it was the host, and its fate stays what it is.
        """
        began = time.monotonic()
        waiting = [name for name in batch.hosts if self.report.hosts[name].fate == "pending"]
        failed = [name for name in batch.hosts if self.report.hosts[name].fate in ("failed", "overdue")]
        now = self._fleet.look(failed) if failed else {}
        waiting += [name for name in failed if name in now and self._is_touched(name, now[name])]
        while waiting:
            seen = self._fleet.look(waiting)
            is_over = time.monotonic() - began > self._rules.gate_seconds
            for name in list(waiting):
                if name not in seen:
                    if is_over:
                        waiting.remove(name)
                        self._settle(name, "lost", f"can't be reached, {self._rules.gate_seconds:g} s after its deploy")
                    continue
                verdict = self._judge(name, seen[name])
                if verdict.health == "bad-release" or (verdict.health == "wait" and is_over):
                    late = f" after {self._rules.gate_seconds:g} s" if is_over else ""
                    return f"{name}: {verdict.reason}{late}"
                if verdict.health != "wait":
                    waiting.remove(name)
                    self.report.hosts[name].seconds += time.monotonic() - began
                    self._settle(name, "done" if verdict.health == "well" else "lost", verdict.reason)
            self._save(self.report)
            if waiting:
                time.sleep(self._rules.look_every_seconds)
        return None

    def _settle(self, name: str, fate: Fate, reason: str) -> None:
        """The gate is through with a host. One whose deploy had failed stays what it is."""
        if self.report.hosts[name].fate == "pending":
            self._set(name, fate, reason)

    def _judge(self, name: str, seen: Seen) -> gate.Verdict:
        before = self._before[name].reports if name in self._before else ()
        return gate.judge(before, seen.reports, self._rules.gate_rounds)

    def _is_touched(self, name: str, now: Seen) -> bool:
        """Whether the deploy got so far that the host is not whole as it was before."""
        before = self._before[name].state["deployed"]
        return before is None or now.state["deployed"] != before

    def _go_back(self, reason: str) -> None:
        """Have all hosts that were touched as they were; those that did nothing stay as they are."""
        self._say(f"the gate stays closed: {reason}")
        self.report.reason = reason
        touched = [name for name, host in self.report.hosts.items() if host.batch is not None and name in self._before]
        seen = self._fleet.look(touched)

        def go_back(name: str) -> None:
            if name not in seen:
                self._set(name, "stuck", "can't be reached to go back")
            elif not self._is_touched(name, seen[name]):
                if self.report.hosts[name].fate == "pending":
                    self._set(name, "rolled-back", "the deploy had changed nothing")
            elif seen[name].state["previous"] is None:
                self._set(name, "stuck", "no earlier deploy is kept on it; stop it, or deploy a release that works")
            else:
                ran = self._fleet.go_back(name)
                if ran.outcome == "done":
                    self._set(name, "rolled-back", f"is again at {str(seen[name].state['previous'])[:12]}")
                else:
                    self._set(name, "stuck", ran.reason)

        self._at_once(go_back, touched)
        self._finish("stuck" if self.report.those("stuck") else "rolled-back", reason)

    def _at_once(self, work: Callable[[str], None], names: Sequence[str]) -> None:
        """Do it for all hosts at the same time. Whoever interrupts that ends what is under way."""
        with ThreadPoolExecutor(NUM_PARALLEL) as pool:
            futures = [pool.submit(work, name) for name in names]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                self._fleet.stop()
                raise

    def _set(self, name: str, fate: Fate, reason: str) -> None:
        host = self.report.hosts[name]
        host.fate, host.reason = fate, reason
        self._say(f"  {name}: {fate}{f', {reason}' if reason else ''}")

    def _finish(self, result: report.Result, reason: str) -> None:
        self.report.result, self.report.reason, self.report.finished_at = result, reason, time.time()
        self._save(self.report)


def run(options: argparse.Namespace) -> None:
    """Roll out, or resume. Raises ReleaseRefused if it went back, WorkerError if hosts are left, SettingsError."""
    rules = Rules(Size.parse(options.batch), options.gate_rounds, options.gate_seconds)
    folder = options.output or Path("rollouts") / Path(options.inventory).stem
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "report.json"
    pyinfra = Pyinfra(options.inventory)
    heed_signals()
    with lock_folder(folder, "--output"):
        hosts = pyinfra.hosts(timeout=ASK_SECONDS)
        so_far = _resumed(file, options.inventory, hosts) if options.resume else _new(options.inventory, hosts)
        fleet = PyinfraFleet(pyinfra, folder, options.deadline)
        coordinators = [host["name"] for host in hosts if COORDINATORS in host["groups"]]
        try:
            with _bar(so_far) as (show, say):

                def save(now: Report) -> None:
                    now.write(file)
                    show(now)

                Rollout(fleet, rules, coordinators, so_far, save, say).run()
        except BaseException:
            # Ctrl-C, or an inventory that is refused.
            so_far.result = "interrupted"
            so_far.write(file)
            raise
    _conclude(so_far, file)


def _new(inventory: str, hosts: Sequence[Mapping[str, Any]]) -> Report:
    """Every host with the commit that its data name now: a branch that moves during the rollout moves nobody."""
    commits: dict[tuple[str, str], str] = {}
    reports = {}
    for host in hosts:
        source = f"inventory data of {host['name']}"
        repository = host["data"].get("release_repository") or operator.origin(CHECKOUT, source)
        ref = str(host["data"].get("release_ref", "main"))
        if (repository, ref) not in commits:
            commits[repository, ref] = operator.resolve(repository, ref, source)
        reports[host["name"]] = report.HostReport(commits[repository, ref])
    return Report(inventory, reports)


def _resumed(file: Path, inventory: str, hosts: Sequence[Mapping[str, Any]]) -> Report:
    """The earlier rollout, with what it left behind pending again. Hosts that it brought through stay untouched."""
    so_far = report.read(file)
    if so_far.inventory != inventory:
        raise SettingsError(f"{file}: of {so_far.inventory}; expected a rollout of {inventory}; see --output")
    if so_far.result in ("rolled-back", "stuck"):
        raise SettingsError(
            f"{file}: that release was rolled back ({so_far.reason}); mend it and start anew, without --resume"
        )
    names = {host["name"] for host in hosts}
    so_far.hosts = {name: host for name, host in so_far.hosts.items() if name in names}
    left = so_far.those("unreachable", "overdue", "failed", "lost")
    for name in left:
        so_far.hosts[name].fate, so_far.hosts[name].reason = "pending", ""
    return so_far


class _bar:  # noqa: N801 - a context manager that reads as a function
    """A bar of hosts on a terminal, lines above it; only lines elsewhere."""

    def __init__(self, so_far: Report) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("rollout"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("rollout", total=len(so_far.hosts))

    def __enter__(self) -> tuple[Callable[[Report], None], Callable[[str], None]]:
        self._progress.start()
        return self._show, lambda line: self._progress.console.print(escape(line), highlight=False, soft_wrap=True)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, now: Report) -> None:
        self._progress.update(self._task, completed=len(now.hosts) - len(now.those("pending")))


def _conclude(done: Report, file: Path) -> None:
    console = Console()
    console.print(report.table(done))
    print(report.summary(done), file=sys.stdout, flush=True)
    if done.result in ("rolled-back", "stuck"):
        went = "all that it touched is as it was" if done.result == "rolled-back" else "some hosts could not go back"
        raise ReleaseRefused(f"{done.reason}; {went}; logs and report are in {file.parent}")
    if done.result == "incomplete":
        raise WorkerError(
            f"not all hosts have it; `hivewright rollout --resume {done.inventory}` goes on with those, once they are "
            f"mended; logs and report are in {file.parent}"
        )
