"""A rollout: deploy a release to one host, then to batches, as long as they make progress.

Every host is deployed by its own pyinfra with its own deadline, so none delays another. If the gate
finds that a batch does not train, every host that this rollout touched is rolled back. A host with
its own problem (unreachable, hanging, full) is left behind, and `--resume` continues with those.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from deploys.fleet import health_gate, report
from deploys.fleet.batches import Batch, Size, next_batch
from deploys.fleet.pyinfra_process import Ran
from deploys.fleet.report import Fate, Report

LOOK_EVERY_SECONDS = 5.0
SAY_EVERY_SECONDS = 60.0
# A host that reboots is usually back by then; with one that is not, --resume can continue.
GONE_SECONDS = 180.0
# Largest number of concurrent pyinfra processes: each takes about 80 MB.
NUM_PARALLEL = 16
# After this many failed canaries in a row the release is considered the cause.
NUM_CANARIES = 3

_FATES: Mapping[str, Fate] = {
    "unreachable": "unreachable",
    "overdue": "overdue",
    "failed": "failed",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """A host's report on itself: its HostState and NodeReports, as dicts."""

    state: Mapping[str, Any]
    reports: Sequence[Mapping[str, Any]]


class Fleet(Protocol):
    """The operations on hosts that a rollout needs."""

    def deploy(
        self,
        host: str,
        commit: str,
    ) -> Ran:
        """Deploy one host with that commit."""

    def look(
        self,
        hosts: Sequence[str],
    ) -> dict[str, Seen]:
        """Return the reports of the hosts that can be reached."""

    def go_back(self, host: str, reason: str) -> Ran:
        """Restore one host's state before its last deploy, and note the reason there."""

    def stop(self) -> None:
        """End running operations after an interruption."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Limits of a rollout.

    The gate waits at most `gate_seconds` until each worker of a batch meets `wanted`, and at most
    `gone_seconds` for a host that does not answer. It reports the reason for waiting when that
    changes, and every `say_every_seconds`.
    """

    size: Size
    wanted: health_gate.Wanted
    gate_seconds: float
    gone_seconds: float = GONE_SECONDS
    look_every_seconds: float = LOOK_EVERY_SECONDS
    say_every_seconds: float = SAY_EVERY_SECONDS


class Rollout:
    """One rollout; `save` is called with the report whenever it changes."""

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
        # The state of each host before this rollout touched it.
        self._before: dict[str, Seen] = {}
        # By host, the gate's last printed reason for waiting, and the time.
        self._waits: dict[str, tuple[str, float]] = {}
        batches = [host.batch or 0 for host in so_far.hosts.values()]
        self._num_batches = max(batches, default=0)

    def run(self) -> None:
        """Deploy all pending hosts, batch by batch, until the gate refuses the release.

        If the gate had refused it before, and a rollback was interrupted or incomplete, continue
        that.
        """
        self.report.result, self.report.finished_at = "running", None
        if self.report.reason:
            self._go_back(self.report.reason)
            return
        self._look_first()
        num_failed_canaries = 0
        while (batch := self._next()) is not None:
            self._num_batches += 1
            self._say(f"batch {self._num_batches} ({batch.kind}): {', '.join(batch.hosts)}")
            for name in batch.hosts:
                self.report.hosts[name].batch = self._num_batches
            self._save(self.report)
            self._deploy(batch)
            reason = self._await_gate(batch)
            first = self.report.hosts[batch.hosts[0]]
            if reason is None and batch.kind == "canary" and first.fate == "failed":
                num_failed_canaries += 1
                if num_failed_canaries == NUM_CANARIES:
                    reason = f"{NUM_CANARIES} hosts in a row could not be deployed: {first.reason}"
            if reason is not None:
                self._go_back(reason)
                return
        left = self.report.those("unreachable", "overdue", "failed", "lost")
        self._finish("incomplete" if left else "done", "")

    def _next(self) -> Batch | None:
        bare = {name for name, seen in self._before.items() if seen.state["deployed"] is None}
        return next_batch(
            self.report.those("pending"),
            self.report.those("done"),
            self._coordinators,
            bare,
            self._rules.size,
        )

    def _look_first(self) -> None:
        """Query pending hosts; those that do not answer are not deployed and delay nobody."""
        pending = self.report.those("pending")
        self._before = self._fleet.look(pending)
        if missing := [name for name in pending if name not in self._before]:
            # A host that froze in the middle of its answer may have spoilt the others' answers.
            self._before |= self._fleet.look(missing)
        for name in pending:
            host = self.report.hosts[name]
            if name not in self._before:
                self._set(name, "unreachable", "no connection before anything was done")
            elif host.batch is None:
                state = self._before[name].state
                host.before, host.digest_before = state["commit"], state["deployed"]
        self._save(self.report)

    def _deploy(self, batch: Batch) -> None:
        """Deploy the hosts of the batch in parallel; successful ones stay pending for the gate."""

        def deploy(name: str) -> None:
            began = time.monotonic()
            host = self.report.hosts[name]
            ran = self._fleet.deploy(name, host.commit)
            host.seconds, host.num_changes = time.monotonic() - began, ran.num_changes
            if ran.outcome == "done":
                self._say(f"  {name}: deployed in {host.seconds:.0f} s, {ran.num_changes} changes")
                if ran.reason:
                    host.reason = f"but {ran.reason}"
            else:
                self._set(name, _FATES[ran.outcome], ran.reason)

        self._at_once(deploy, batch.hosts)
        self._save(self.report)

    def _await_gate(self, batch: Batch) -> str | None:
        """Wait until the batch makes progress; return why the release is refused, None: it is not.

        Hosts whose deploy failed half-way are watched too: if the new release runs there and ends,
        the release is at fault. If the old release keeps running, the host is at fault, and its
        fate does not change.
        """
        began = time.monotonic()
        waiting = self._hosts_to_watch(batch)
        last_seen = dict.fromkeys(waiting, began)
        while waiting:
            seen = self._fleet.look(waiting)
            now = time.monotonic()
            waited = now - began
            is_over = waited > self._rules.gate_seconds
            last_seen |= dict.fromkeys(seen, now)
            for name in list(waiting):
                if name not in seen:
                    silent = now - last_seen[name]
                    if is_over or silent > self._rules.gone_seconds:
                        waiting.remove(name)
                        reason = f"can't be reached for {silent:.0f} s, after its deploy"
                        self._settle(name, "lost", reason)
                    continue
                verdict = self._judge(name, seen[name])
                if verdict.health == "bad-release" or (verdict.health == "wait" and is_over):
                    late = f" after {self._rules.gate_seconds:g} s" if is_over else ""
                    return f"{name}: {verdict.reason}{late}"
                if verdict.health == "wait":
                    self._say_wait(name, verdict.reason, waited)
                    continue
                waiting.remove(name)
                self._settle_by(verdict, name, waited)
            self._save(self.report)
            if waiting:
                time.sleep(self._rules.look_every_seconds)
        return None

    def _hosts_to_watch(self, batch: Batch) -> list[str]:
        """Return the deployed hosts of a batch, and those that a failed deploy has changed."""
        fates = {name: self.report.hosts[name].fate for name in batch.hosts}
        deployed = [name for name, fate in fates.items() if fate == "pending"]
        failed = [name for name, fate in fates.items() if fate in ("failed", "overdue")]
        seen = self._fleet.look(failed) if failed else {}
        return [*deployed, *(name for name in seen if self._is_touched(name, seen[name]))]

    def _settle_by(
        self,
        verdict: health_gate.Verdict,
        name: str,
        seconds: float,
    ) -> None:
        host = self.report.hosts[name]
        host.seconds += seconds
        if verdict.health == "well":
            self._settle(name, "done", host.reason)
        else:
            self._settle(name, "lost", verdict.reason)

    def _say_wait(
        self,
        name: str,
        reason: str,
        waited: float,
    ) -> None:
        last, at = self._waits.get(name, ("", 0.0))
        if reason != last or waited - at >= self._rules.say_every_seconds:
            self._waits[name] = reason, waited
            limit = self._rules.gate_seconds
            self._say(f"  {name}: waiting ({waited:.0f} of at most {limit:.0f} s): {reason}")

    def _settle(
        self,
        name: str,
        fate: Fate,
        reason: str,
    ) -> None:
        """Set the fate of a host after the gate, unless its deploy had failed."""
        if self.report.hosts[name].fate == "pending":
            self._set(name, fate, reason)

    def _judge(
        self,
        name: str,
        seen: Seen,
    ) -> health_gate.Verdict:
        before = self._before[name].reports if name in self._before else ()
        return health_gate.judge(before, seen.reports, self._rules.wanted)

    def _is_touched(
        self,
        name: str,
        now: Seen,
    ) -> bool:
        """Return whether the deploy has changed the host."""
        before = self.report.hosts[name].digest_before
        return before is None or now.state["deployed"] != before

    def _go_back(self, reason: str) -> None:
        """Roll back all hosts that were touched; unchanged hosts stay as they are."""
        self._say(f"the gate stays closed: {reason}")
        self.report.reason = reason
        self._save(self.report)
        hosts = self.report.hosts
        touched = [name for name, host in hosts.items() if host.batch is not None]
        touched = [name for name in touched if hosts[name].fate != "rolled-back"]
        seen = self._fleet.look(touched)

        def go_back(name: str) -> None:
            if name not in seen:
                self._set(name, "stuck", "can't be reached to go back")
            elif not self._is_touched(name, seen[name]):
                if hosts[name].fate in ("pending", "stuck"):
                    self._set(name, "rolled-back", "is as it was")
            elif obstacle := _why_not_back(hosts[name], seen[name]):
                self._set(name, "stuck", obstacle)
            else:
                ran = self._fleet.go_back(name, f"a rollout's gate refused it: {reason}")
                if ran.outcome == "done":
                    self._set(
                        name, "rolled-back", f"is again at {str(seen[name].state['previous'])[:12]}"
                    )
                else:
                    self._set(name, "stuck", ran.reason)

        self._at_once(go_back, touched)
        self._finish("stuck" if self.report.those("stuck") else "rolled-back", reason)

    def _at_once(
        self,
        work: Callable[[str], None],
        names: Sequence[str],
    ) -> None:
        """Call `work` for all hosts in parallel; an interruption ends running operations."""
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

    def _set(
        self,
        name: str,
        fate: Fate,
        reason: str,
    ) -> None:
        host = self.report.hosts[name]
        host.fate, host.reason = fate, reason
        self._say(f"  {name}: {fate}{f', {reason}' if reason else ''}")

    def _finish(
        self,
        result: report.Result,
        reason: str,
    ) -> None:
        self.report.result, self.report.reason = result, reason
        self.report.finished_at = time.time()
        self._save(self.report)


def _why_not_back(host: report.HostReport, now: Seen) -> str:
    """Return why a host cannot be restored to its state before the rollout; empty: it can."""
    previous = now.state["previous"]
    if previous is None:
        return "no earlier deploy is kept on it; stop it, or deploy a release that works"
    if host.digest_before is not None and previous != host.before:
        return "another run has deployed it since; deploy a release that works"
    return ""
