"""Facts of many hosts: asked together, and one by one if one host spoils the common answer."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from deploys.fleet.pyinfra_process import Answers, Late, Pyinfra, Stopped
from worker.errors import SettingsError, WorkerError

FACTS = ("deploys.fleet_facts.HostStates", "deploys.fleet_facts.NodeReports")
# pyinfra gives up a host that hangs (for example in its driver) long before the answers of the
# others would be given up.
FACT_SECONDS = 50
ASK_SECONDS = 150.0
NUM_PARALLEL = 16


@dataclass(slots=True)
class Looked:
    """HostState and NodeReports as dicts, by host; `reasons`: why hosts lack one of them."""

    states: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def look(
    pyinfra: Pyinfra,
    hosts: Sequence[str],
) -> Looked:
    """Ask hosts for their state. Raises as `ask` does."""
    answers = ask(pyinfra, FACTS, hosts, FACT_SECONDS)
    states, reports = answers.values
    return Looked(states, reports, answers.reasons)


def ask(
    pyinfra: Pyinfra,
    facts: Sequence[str],
    hosts: Sequence[str],
    seconds: int,
) -> Answers:
    """Ask hosts for facts (`module.Class key=value ...`), each for at most `seconds`.

    Raises SettingsError without an inventory, Stopped when the operator interrupts.
    """
    limit = {"_timeout": str(seconds)}
    none = Answers([{} for argument in facts if "=" not in argument], {})
    if not hosts:
        return none
    try:
        return pyinfra.facts(
            *facts, hosts=hosts, timeout=ASK_SECONDS + seconds - FACT_SECONDS, data=limit
        )
    except (SettingsError, Stopped):
        raise
    except WorkerError as error:
        if len(hosts) == 1:
            return Answers(none.values, {hosts[0]: _reason(error)})
    with ThreadPoolExecutor(NUM_PARALLEL) as pool:
        futures = [pool.submit(ask, pyinfra, facts, [host], seconds) for host in hosts]
    for one in (future.result() for future in futures):
        for found, value in zip(none.values, one.values, strict=True):
            found.update(value)
        none.reasons.update(one.reasons)
    return none


def _reason(error: Exception) -> str:
    return f"no answer within {error.seconds:g} s" if isinstance(error, Late) else str(error)
