"""Fit a plan to the facts of its host: slots on GPUs, the build of torch, and reasons to refuse."""

from dataclasses import replace

from pyinfra import host

from deploys.facts import DamagedEnrolments, MovedAway
from deploys.gpus import Gpus
from deploys.hardware import Distribution, HostGpus, MissingParts, OwnPipSources
from deploys.inventory.host_plan import HostPlan, Planned
from deploys.inventory.schema import PIP, Deployment
from deploys.inventory.slots import cards_in_use
from deploys.inventory.torch_builds import X86, choose_torch
from deploys.paths import STATE
from deploys.pyinfra_ext import run_report
from worker.errors import SettingsError

NO_ANVIL = (
    "the chain's program (contracts/package-lock.json) is for x86_64, and this host is {machine}:"
    " make another host the coordinator, or put anvil for it on the host and name it, anvil_binary:"
    " /usr/local/bin/anvil"
)
DAMAGED = (
    "{files}: damaged; expected the JSON that enrolment wrote: restore it (`hivewright fleet"
    " restore`), or remove it, and the next deploy enrols the slot again, with the key that is next"
    " to it"
)
MOVED = (
    "the key of slot {numbers} was set aside by a move (swarm.pem.moved in {state}/worker-N). If"
    " the move is to stay, take the slot out of the inventory and deploy; put in again after that,"
    " it is a new worker. If it is to be undone, `hivewright fleet take-back INVENTORY --limit"
    " {name}` gives the key back"
)


def fit(planned: Planned) -> Planned:
    """Return the plan of the current host with its slots on GPUs and torch's package index.

    If the host's facts contradict the plan, `unfit` is the reason.
    """
    machine = host.get_fact(Distribution).machine
    reason = _unfit(planned.host, machine)
    if reason is not None:
        return replace(planned, unfit=reason)
    gpus = host.get_fact(HostGpus) if planned.host.slots else Gpus()
    try:
        plan = planned.host.on(gpus)
        if gpus.warning:
            rest = "the other GPUs are used" if gpus.cards else "its slots train on the CPU"
            run_report.note(f"{host.name}: {gpus.warning}; {rest}")
        torch_index = _torch_index(plan, gpus, machine)
    except SettingsError as error:
        return replace(planned, unfit=str(error))
    return replace(planned, host=plan, torch_index=torch_index)


def _unfit(plan: HostPlan, machine: str) -> str | None:
    """Return why the current host cannot become what the plan says, apart from its GPUs."""
    if missing := host.get_fact(MissingParts):
        return f"{host.name}: {missing}"
    if plan.needs_anvil and machine != X86:
        return NO_ANVIL.format(machine=machine)
    if damaged := host.get_fact(DamagedEnrolments):
        return DAMAGED.format(files=", ".join(damaged))
    if moved := _moved_away(plan):
        numbers = ", ".join(map(str, moved))
        return MOVED.format(numbers=numbers, state=STATE, name=plan.name)
    return None


def _moved_away(plan: HostPlan) -> list[int]:
    """Return planned slots whose key has moved to another host and that have no key file."""
    has_key = {slot.number for slot in plan.slots if slot.identity is not None}
    moved = set(host.get_fact(MovedAway)) - has_key
    if not plan.has_auto_slots:
        moved &= {slot.number for slot in plan.slots}
    return sorted(moved)


def _torch_index(
    plan: HostPlan,
    gpus: Gpus,
    machine: str,
) -> str | None:
    """Return the package index of torch; None: as pip is configured."""
    deployment = plan.deployment
    if deployment.torch_index == PIP:
        return None
    if deployment.torch_index is None and _uses_pip_of_host(deployment):
        return None
    used = replace(gpus, cards=cards_in_use(plan.slots, gpus))
    return choose_torch(used, deployment.torch_index, machine)


def _uses_pip_of_host(deployment: Deployment) -> bool:
    """Return whether packages come from pip on the host, and pip there has its own sources."""
    return deployment.release_source == "repository" and bool(host.get_fact(OwnPipSources))
