"""The health gate: a deployed service must make progress; running is not enough.

A worker makes progress when it finishes rounds after its start, its reward is not far below that of
earlier rounds, and the chain confirms a reward; a keeper when its round advances; any other service
when it runs. The cause of a failure may be the release, which is then rolled back, or the host
(full disk, unreachable), which stops no other host.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from worker.errors import ResourceError

# systemd has started it again so often since the deploy: it won't get better.
MAX_RESTARTS = 2

# This many rounds below the wanted share of the earlier reward are not an accident.
MAX_POOR_ROUNDS = 8
# An earlier reward is only a measure if it is the mean of this many rounds.
MIN_ROUNDS_BEFORE = 3

Health = Literal["well", "wait", "bad-release", "bad-host"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verdict; `reason` is what is missing or wrong, empty if all is well."""

    health: Health
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Demands on a worker.

    `rounds`: rounds finished since its start. `reward_share`: minimal mean reward, as a share of
    that of the rounds before; 0: any. `credits`: the chain must have confirmed a reward since, if
    it did before.
    """

    rounds: int = 1
    reward_share: float = 0.0
    credits: bool = False


def judge(
    before: Sequence[Mapping[str, Any]],
    now: Sequence[Mapping[str, Any]],
    wanted: Wanted,
) -> Verdict:
    """Judge a host by its NodeReports `before` its deploy and `now`."""
    if not now:
        return Verdict("wait", "none of its services is configured")
    earlier = {report["unit"]: report for report in before}
    verdicts = [_judge_unit(earlier.get(report["unit"]), report, wanted) for report in now]
    for health in ("bad-release", "bad-host", "wait"):
        for verdict in verdicts:
            if verdict.health == health:
                return verdict
    return Verdict("well")


def _judge_unit(
    before: Mapping[str, Any] | None,
    now: Mapping[str, Any],
    wanted: Wanted,
) -> Verdict:
    unit = now["unit"].removeprefix("hivewright-").removesuffix(".service")
    num_restarts = _restarts_since(before, now)
    # While it starts again it has not ended: only its next end says whose fault that is.
    if now["active_state"] == "failed" or (num_restarts >= MAX_RESTARTS and now["exit_status"]):
        said = now.get("last_words") or (now["status"] or {}).get("last_error")
        reason = (
            f"{unit} ended with code {now['exit_status']}, {num_restarts}"
            f" restarts{f': {said}' if said else ''}"
        )
        return Verdict(
            "bad-host" if now["exit_status"] == ResourceError.exit_code else "bad-release", reason
        )
    if now["active_state"] != "active":
        said = now.get("last_words")
        return Verdict(
            "wait", f"{unit} is {now['active_state']}{f'; it said: {said}' if said else ''}"
        )
    if unit == "keeper":
        return _judge_keeper(before, now)
    return (
        _judge_worker(unit, before, now, wanted) if unit.startswith("worker@") else Verdict("well")
    )


def _judge_worker(
    unit: str,
    before: Mapping[str, Any] | None,
    now: Mapping[str, Any],
    wanted: Wanted,
) -> Verdict:
    num_finished = sum(at > now["started_at"] for at in now["finished"])
    activity = (now["status"] or {}).get("activity", "starting")
    if num_finished < wanted.rounds:
        return Verdict(
            "wait",
            f"{unit} has finished {num_finished} of {wanted.rounds} rounds, it is {activity}",
        )
    was, is_now = (
        _mean_reward(before, now["started_at"])[0],
        _mean_reward(now, now["started_at"])[1],
    )
    if wanted.reward_share and was and is_now is not None and is_now < wanted.reward_share * was:
        reason = (
            f"{unit} has a mean reward of {is_now:.3g} in {num_finished} rounds, before it was"
            f" {was:.3g}; expected at least {wanted.reward_share:.0%} of that (--gate-reward)"
        )
        return Verdict("bad-release" if num_finished >= MAX_POOR_ROUNDS else "wait", reason)
    if wanted.credits and (missing := _missing_credit(before, now)):
        return Verdict("wait", f"{unit} {missing} (--no-gate-credits: do not wait for that)")
    return Verdict("well")


def _mean_reward(
    report: Mapping[str, Any] | None, started_at: float
) -> tuple[float | None, float | None]:
    """Return mean rewards before `started_at` (None: too few rounds) and since (None: none)."""
    pairs = zip((report or {}).get("finished", ()), (report or {}).get("rewards", ()), strict=False)
    rounds = [(at, reward) for at, reward in pairs if reward is not None]
    before, since = (
        [r for at, r in rounds if at <= started_at],
        [r for at, r in rounds if at > started_at],
    )
    was = sum(before) / len(before) if len(before) >= MIN_ROUNDS_BEFORE else None
    return was, sum(since) / len(since) if since else None


def _missing_credit(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Return what is missing for a confirmed reward since the deploy; empty: nothing, or unknown.

    A worker without a confirmed reward before the deploy, or without a chain, is not judged by it.
    """
    was = _ledger(before).get("confirmed", 0)
    ledger = _ledger(now)
    if not was or ledger.get("confirmed", 0) > was:
        return ""
    said = (now["status"] or {}).get("ledger_error")
    return f"has no reward confirmed since its deploy, {was} as before{f': {said}' if said else ''}"


def _ledger(report: Mapping[str, Any] | None) -> Mapping[str, int]:
    return ((report or {}).get("status") or {}).get("ledger") or {}


def _restarts_since(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> int:
    """Return the restarts since `before`; systemd's count begins again at a manual start."""
    earlier = before["restarts"] if before else 0
    return int(now["restarts"] - earlier if now["restarts"] >= earlier else now["restarts"])


def _judge_keeper(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> Verdict:
    """Judge a keeper: its round must advance if anybody is expected to report."""
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
