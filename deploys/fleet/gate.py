"""Whether what was deployed works: not that it runs, but that it gets on.

A worker gets on when it finishes rounds after it was started; a keeper when its round moves. What stands in the way may
be the release, which then goes back, or the host (its disk is full, it is gone), which holds nobody else up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from worker.errors import ResourceError

# systemd has started it again so often since the deploy: it won't get better.
MAX_RESTARTS = 2

Health = Literal["well", "wait", "bad-release", "bad-host"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason`: what is waited for, or what is wrong; empty when all is well."""

    health: Health
    reason: str = ""


def judge(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], num_rounds: int) -> Verdict:
    """What a host's NodeReports say, `before` its deploy and `now`. Every worker must finish `num_rounds` rounds."""
    if not now:
        return Verdict("wait", "none of its services is configured")
    earlier = {report["unit"]: report for report in before}
    verdicts = [_judge_unit(earlier.get(report["unit"]), report, num_rounds) for report in now]
    for health in ("bad-release", "bad-host", "wait"):
        for verdict in verdicts:
            if verdict.health == health:
                return verdict
    return Verdict("well")


def _judge_unit(before: Mapping[str, Any] | None, now: Mapping[str, Any], num_rounds: int) -> Verdict:
    unit = now["unit"].removeprefix("hivewright-").removesuffix(".service")
    num_restarts = _restarts_since(before, now)
    # While it starts again it has not ended: only its next end says whose fault that is.
    if now["active_state"] == "failed" or (num_restarts >= MAX_RESTARTS and now["exit_status"]):
        said = (now["status"] or {}).get("last_error")
        reason = f"{unit} ended with code {now['exit_status']}, {num_restarts} restarts{f': {said}' if said else ''}"
        return Verdict("bad-host" if now["exit_status"] == ResourceError.exit_code else "bad-release", reason)
    if now["active_state"] != "active":
        return Verdict("wait", f"{unit} is {now['active_state']}")
    if unit == "keeper":
        return _judge_keeper(before, now)
    num_finished = sum(at > now["started_at"] for at in now["finished"])
    if num_finished >= num_rounds:
        return Verdict("well")
    activity = (now["status"] or {}).get("activity", "starting")
    return Verdict("wait", f"{unit} has finished {num_finished} of {num_rounds} rounds, it is {activity}")


def _restarts_since(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> int:
    """systemd counts from zero again when somebody starts the unit."""
    earlier = before["restarts"] if before else 0
    return int(now["restarts"] - earlier if now["restarts"] >= earlier else now["restarts"])


def _judge_keeper(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> Verdict:
    """Where nobody is expected to report, no round will end."""
    was, status = (before or {}).get("status"), now["status"]
    if now.get("problem"):
        return Verdict("wait", f"keeper's {now['problem']}")
    if status is None:
        return Verdict("wait", "keeper has not looked at the chain yet")
    if was is None or was["round"] is None or not was["expected"]:
        return Verdict("well")
    if status["round"] is not None and status["round"] > was["round"]:
        return Verdict("well")
    return Verdict("wait", f"keeper is at round {status['round']}, as before")
