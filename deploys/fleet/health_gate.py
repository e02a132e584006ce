"""The health gate: a deployed service must make progress; running is not enough.

A worker makes progress when it finishes rounds after its start, its reward is not far below that of
earlier rounds, and the chain confirms a reward; a keeper when its round advances; any other service
when it runs. The cause of a failure may be the release, which is then rolled back, or the host
(full disk, unreachable), which stops no other host.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from worker.errors import DeviceIll, ResourceError

# After this many restarts by systemd since the deploy, the service won't recover.
MAX_RESTARTS = 2

# This many rounds below the wanted share of the earlier reward are not chance.
MAX_POOR_ROUNDS = 8
# An earlier reward is used only if it is the mean of at least this many rounds.
MIN_ROUNDS_BEFORE = 3

# Health checks of a worker (worker/telemetry/health.py) that concern its host, not the release.
HOST_CHECKS = ("gpu", "disk", "ram", "pressure", "clock")
# Exit codes whose cause is the host.
_OF_THE_HOST = (ResourceError.exit_code, DeviceIll.exit_code)

# A NodeReport, as a dict.
Report = Mapping[str, Any]
Health = Literal["well", "wait", "bad-release", "bad-host"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verdict; `reason`: what is missing or wrong, empty if nothing is."""

    health: Health
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The requirements that a worker must meet.

    `rounds`: rounds finished since its start. `reward_share`: smallest mean reward, as a share of
    that of the rounds before; 0: any. `credits`: the chain must have confirmed a reward since then,
    if it did before.
    """

    rounds: int = 1
    reward_share: float = 0.0
    credits: bool = False


def judge(
    before: Sequence[Report],
    now: Sequence[Report],
    wanted: Wanted,
) -> Verdict:
    """Judge a host by its NodeReports `before` its deploy and `now`."""
    if not now:
        return Verdict("wait", "none of its services is configured")
    earlier = {report["unit"]: report for report in before}
    verdicts = []
    for report in now:
        verdicts.append(_judge_unit(earlier.get(report["unit"]), report, wanted))
    for health in ("bad-release", "bad-host", "wait"):
        for verdict in verdicts:
            if verdict.health == health:
                return verdict
    return Verdict("well")


def _judge_unit(
    before: Report | None,
    now: Report,
    wanted: Wanted,
) -> Verdict:
    unit = now["unit"].removeprefix("hivewright-").removesuffix(".service")
    state, exit_status = now["active_state"], now["exit_status"]
    num_restarts = _restarts_since(before, now)
    # A unit that is being restarted has not ended: the cause is judged at its next end.
    if state == "failed" or (exit_status and num_restarts >= MAX_RESTARTS):
        words = now.get("last_words") or _status(now).get("last_error")
        reason = f"{unit} ended with code {exit_status}, {num_restarts} restarts"
        health: Health = "bad-host" if exit_status in _OF_THE_HOST else "bad-release"
        return Verdict(health, f"{reason}: {words}" if words else reason)
    if state != "active":
        words = now.get("last_words")
        reason = f"{unit} is {state}"
        return Verdict("wait", f"{reason}; it said: {words}" if words else reason)
    if unit == "keeper":
        return _judge_keeper(before, now)
    if unit.startswith("worker@"):
        return _judge_worker(unit, before, now, wanted)
    return Verdict("well")


def _judge_worker(
    unit: str,
    before: Report | None,
    now: Report,
    wanted: Wanted,
) -> Verdict:
    for warning in _status(now).get("warnings", ()):
        if warning["check"] in HOST_CHECKS and warning["severity"] == "severe":
            return Verdict("bad-host", f"{unit}: {warning['text']}")
    started_at = now["started_at"]
    num_finished = sum(at > started_at for at in now["finished"])
    if num_finished < wanted.rounds:
        activity = _status(now).get("activity", "starting")
        return Verdict(
            "wait",
            f"{unit} has finished {num_finished} of {wanted.rounds} rounds, it is {activity}",
        )
    earlier = [reward for at, reward in _rewards(before) if at <= started_at]
    since = [reward for at, reward in _rewards(now) if at > started_at]
    if since and len(earlier) >= MIN_ROUNDS_BEFORE:
        was, reward = fmean(earlier), fmean(since)
        if reward < wanted.reward_share * was:
            reason = (
                f"{unit} has a mean reward of {reward:.3g} in {num_finished} rounds, before it was"
                f" {was:.3g}; expected at least {wanted.reward_share:.0%} of that (--gate-reward)"
            )
            return Verdict("bad-release" if num_finished >= MAX_POOR_ROUNDS else "wait", reason)
    if wanted.credits and (missing := _missing_credit(before, now)):
        return Verdict("wait", f"{unit} {missing} (--no-gate-credits: do not wait for that)")
    return Verdict("well")


def _status(report: Report | None) -> Mapping[str, Any]:
    return (report or {}).get("status") or {}


def _rewards(report: Report | None) -> Iterator[tuple[float, float]]:
    """Yield time and mean reward of the rounds in a report that have one."""
    found = report or {}
    rounds = zip(found.get("finished", ()), found.get("rewards", ()), strict=False)
    for at, reward in rounds:
        if reward is not None:
            yield at, reward


def _missing_credit(before: Report | None, now: Report) -> str:
    """Return what is missing for a confirmed reward since the deploy; empty: nothing, or unknown.

    Empty too for a worker without a confirmed reward before the deploy, or without a chain.
    """
    was = (_status(before).get("ledger") or {}).get("confirmed", 0)
    confirmed = (_status(now).get("ledger") or {}).get("confirmed", 0)
    if not was or confirmed > was:
        return ""
    error = _status(now).get("ledger_error")
    missing = f"has no reward confirmed since its deploy, {was} as before"
    return f"{missing}: {error}" if error else missing


def _restarts_since(before: Report | None, now: Report) -> int:
    """Return the restarts since `before`; systemd's count begins again at a manual start."""
    earlier, restarts = before["restarts"] if before else 0, int(now["restarts"])
    return restarts - earlier if restarts >= earlier else restarts


def _judge_keeper(before: Report | None, now: Report) -> Verdict:
    """Judge a keeper: its round must advance if any peer is expected to report."""
    was, status = _status(before), now["status"]
    if now.get("problem"):
        return Verdict("wait", f"keeper's {now['problem']}")
    if status is None:
        return Verdict("wait", "keeper has not looked at the chain yet")
    earlier, current = was.get("round"), status["round"]
    if earlier is None or not was["expected"]:
        return Verdict("well")
    if current is not None and current > earlier:
        return Verdict("well")
    return Verdict("wait", f"keeper is at round {current}, as before")
