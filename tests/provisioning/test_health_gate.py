"""The gate of a rollout: whose fault it is if a deployed service makes no progress."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deploys.fleet.health_gate import Verdict, Wanted, judge
from worker.errors import DeviceIll, ResourceError, TrainingError

START = 1000.0
WORKER = "hivewright-worker@0.service"
KEEPER = "hivewright-keeper.service"


def report(unit: str = WORKER, /, **values: Any) -> dict[str, Any]:
    usual = {
        "unit": unit,
        "active_state": "active",
        "exit_status": 0,
        "restarts": 0,
        "started_at": START,
        "finished": [START + 5],
        "rewards": [0.5],
        "status": {},
    }
    return usual | values


def verdict(now: dict[str, Any], before: dict[str, Any] | None = None, **wanted: Any) -> Verdict:
    return judge([before] if before else [], [now], Wanted(**wanted))


def test_host_without_services_is_waited_for() -> None:
    assert judge([], [], Wanted()) == Verdict("wait", "none of its services is configured")


@pytest.mark.parametrize(
    ("finished", "rounds", "health"),
    [
        ([], 1, "wait"),
        ([START], 1, "wait"),
        ([START + 0.1], 1, "well"),
        ([START - 5, START + 1], 2, "wait"),
        ([START + 1, START + 2], 2, "well"),
        ([], 0, "well"),
    ],
)
def test_only_rounds_after_the_start_count(finished: list[float], rounds: int, health: str) -> None:
    now = report(finished=finished, rewards=[0.5] * len(finished))
    assert verdict(now, rounds=rounds).health == health


def test_worker_that_has_not_finished_says_what_it_does() -> None:
    now = report(finished=[], status={"activity": "training"})
    assert verdict(now, rounds=3) == Verdict(
        "wait", "worker@0 has finished 0 of 3 rounds, it is training"
    )
    assert verdict(report(finished=[], status=None)).reason.endswith("it is starting")


@pytest.mark.parametrize(
    ("exit_status", "health"),
    [
        (1, "bad-release"),
        (TrainingError.exit_code, "bad-release"),
        (ResourceError.exit_code, "bad-host"),
        (DeviceIll.exit_code, "bad-host"),
        (0, "bad-release"),
    ],
)
def test_code_of_a_failed_service_tells_whose_fault_it_is(exit_status: int, health: str) -> None:
    now = report(active_state="failed", exit_status=exit_status, restarts=3)
    assert verdict(now) == Verdict(
        health,  # type: ignore[arg-type]
        f"worker@0 ended with code {exit_status}, 3 restarts",
    )


@pytest.mark.parametrize(
    ("before", "now", "exit_status", "is_over"),
    [
        (0, 1, 1, False),
        (0, 2, 1, True),
        (0, 2, 0, False),
        (5, 6, 1, False),
        (5, 7, 1, True),
        (5, 2, 1, True),  # a manual start has set the count back
        (5, 1, 1, False),
        (None, 2, 1, True),
    ],
)
def test_service_that_ends_again_and_again_is_over(
    before: int | None, now: int, exit_status: int, is_over: bool
) -> None:
    earlier = None if before is None else report(restarts=before)
    later = report(restarts=now, exit_status=exit_status, active_state="activating")
    assert (verdict(later, earlier).health == "bad-release") is is_over


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"last_words": "out of disk"}, ": out of disk"),
        ({"last_words": "", "status": {"last_error": "no peers"}}, ": no peers"),
        ({"last_words": "out of disk", "status": {"last_error": "no peers"}}, ": out of disk"),
        ({"status": None}, ""),
    ],
)
def test_last_words_of_a_service_are_in_the_reason(values: dict[str, Any], words: str) -> None:
    now = report(active_state="failed", exit_status=1, **values)
    assert verdict(now).reason == f"worker@0 ended with code 1, 0 restarts{words}"


@pytest.mark.parametrize("state", ["inactive", "activating", "deactivating"])
def test_service_that_does_not_run_yet_is_waited_for(state: str) -> None:
    assert verdict(report(active_state=state)) == Verdict("wait", f"worker@0 is {state}")
    spoken = report(active_state=state, last_words="loading")
    assert verdict(spoken).reason == f"worker@0 is {state}; it said: loading"


@pytest.mark.parametrize("service", ["chain", "bootnode", "account", "dashboard", "judge"])
def test_other_service_is_well_if_it_runs(service: str) -> None:
    assert verdict(report(f"hivewright-{service}.service", finished=[])) == Verdict("well")


@pytest.mark.parametrize(
    ("check", "severity", "health"),
    [
        ("gpu", "severe", "bad-host"),
        ("disk", "severe", "bad-host"),
        ("gpu", "mild", "well"),
        ("rewards", "severe", "well"),
    ],
)
def test_severe_fault_of_the_machine_is_the_hosts(check: str, severity: str, health: str) -> None:
    warning = {"check": check, "severity": severity, "text": "it is ill"}
    found = verdict(report(status={"warnings": [warning]}))
    assert found.health == health
    assert found.reason == ("worker@0: it is ill" if health == "bad-host" else "")


def rounds(*rewards: float | None, start: float) -> dict[str, Any]:
    return {
        "finished": [start + number for number in range(1, len(rewards) + 1)],
        "rewards": list(rewards),
    }


@pytest.mark.parametrize(
    ("earlier", "since", "share", "health"),
    [
        ([0.5] * 3, [0.25], 0.5, "well"),
        ([0.5] * 3, [0.24], 0.5, "wait"),
        ([0.5] * 3, [0.24] * 8, 0.5, "bad-release"),
        ([0.5] * 3, [0.24] * 7, 0.5, "wait"),
        ([0.5] * 2, [0.0] * 8, 0.5, "well"),  # too few to compare with
        ([0.5] * 3, [0.0] * 8, 0.0, "well"),
        ([0.5, None, None, 0.5, 0.5], [0.0] * 8, 0.5, "bad-release"),
        ([0.5] * 3, [None] * 8, 0.5, "well"),
        ([0.0] * 3, [0.0] * 8, 1.0, "well"),
    ],
)
def test_reward_is_compared_with_that_of_the_rounds_before(
    earlier: list[float | None], since: list[float | None], share: float, health: str
) -> None:
    before = report(**rounds(*earlier, start=START - 100))
    now = report(**rounds(*since, start=START))
    found = verdict(now, before, reward_share=share)
    assert found.health == health
    if health != "well":
        assert found.reason.startswith("worker@0 has a mean reward of ")
        assert found.reason.endswith(f"expected at least {share:.0%} of that (--gate-reward)")


def ledger(confirmed: int | None, **status: Any) -> dict[str, Any]:
    return report(
        status={"ledger": None if confirmed is None else {"confirmed": confirmed}} | status
    )


@pytest.mark.parametrize(
    ("before", "now", "is_well"),
    [
        (ledger(3), ledger(4), True),
        (ledger(3), ledger(3), False),
        (ledger(3), ledger(None), False),
        (ledger(0), ledger(0), True),
        (ledger(None), ledger(0), True),
        (None, ledger(0), True),
    ],
)
def test_reward_that_the_chain_confirms_is_waited_for_if_there_was_one(
    before: dict[str, Any] | None, now: dict[str, Any], is_well: bool
) -> None:
    assert (verdict(now, before, credits=True).health == "well") is is_well
    assert verdict(now, before, credits=False).health == "well"


def test_reason_for_a_missing_credit_has_the_ledgers_error() -> None:
    found = verdict(ledger(3, ledger_error="no answer"), ledger(3), credits=True)
    assert found.reason == (
        "worker@0 has no reward confirmed since its deploy, 3 as before: no answer"
        " (--no-gate-credits: do not wait for that)"
    )


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        (None, {"round": 1}, ""),
        ({"round": 5, "expected": 3}, {"round": 6}, ""),
        ({"round": 5, "expected": 3}, {"round": 5}, "keeper is at round 5, as before"),
        ({"round": 5, "expected": 3}, {"round": None}, "keeper is at round None, as before"),
        ({"round": 5, "expected": 0}, {"round": 5}, ""),
        ({"round": None, "expected": 3}, {"round": 5}, ""),
        (None, None, "keeper has not looked at the chain yet"),
    ],
)
def test_keeper_advances_its_round_if_anybody_reports(
    before: dict[str, Any] | None, now: dict[str, Any] | None, reason: str
) -> None:
    earlier = report(KEEPER, status=before) if before else None
    found = verdict(report(KEEPER, status=now), earlier)
    assert found == (Verdict("wait", reason) if reason else Verdict("well"))


def test_status_of_a_keeper_that_cannot_be_read_is_waited_for() -> None:
    now = report(KEEPER, status=None, problem="status is not JSON")
    assert verdict(now) == Verdict("wait", "keeper's status is not JSON")


_UNITS = {
    "well": report("hivewright-chain.service"),
    "wait": report("hivewright-judge.service", active_state="activating"),
    "bad-host": report(WORKER, active_state="failed", exit_status=ResourceError.exit_code),
    "bad-release": report(KEEPER, active_state="failed", exit_status=1),
}


@hypothesis_settings(max_examples=40, deadline=None, database=None)
@given(states=st.lists(st.sampled_from(sorted(_UNITS)), min_size=1, max_size=5))
def test_worst_service_decides_for_the_host(states: list[str]) -> None:
    order = ["bad-release", "bad-host", "wait", "well"]
    found = judge([], [_UNITS[state] for state in states], Wanted())
    assert found.health == min(states, key=order.index)
