"""All that the operations of a deploy will ask of a host, asked in one go (deploys/pyinfra_ext/fact_cache.py).

What is missing here is asked when it is needed: that is slower, and nothing else.
"""

from collections.abc import Iterator
from pathlib import Path

from pyinfra.context import ctx_host
from pyinfra.facts.files import Directory

from deploys import coordinator_host, locks, system, units, worker
from deploys.facts import (
    COMMAND,
    ChosenModels,
    ConfiguredServices,
    ConfiguredSlots,
    FileContent,
    Identities,
    InstalledPackages,
    PastDeploys,
    Releases,
    Service,
    SystemdVersion,
    UserEntry,
    WireGuard,
)
from deploys.hardware import Distribution
from deploys.inventory.planning import Planned
from deploys.inventory.validation import ENROLMENT_TOKEN
from deploys.node_identity import KEY_FILE
from deploys.paths import CONFIGURATION
from deploys.pyinfra_ext import fact_cache
from deploys.pyinfra_ext.fact_cache import Question
from deploys.tailscale.join import TailnetOfHost


def ask(plan: Planned) -> None:
    """Ask the current host what a deploy that finds it as planned will want to know."""
    fact_cache.ask_ahead(ctx_host.get(), _questions(plan))


def _questions(plan: Planned) -> Iterator[Question]:
    python = system.python_of(ctx_host.get().get_fact(Distribution))
    yield InstalledPackages, {"names": system.packages_on(python, bool(plan.host.services))}
    yield locks.HostLock, {}
    yield UserEntry, {"user": system.USER}
    if plan.host.deployment.tailscale:
        yield TailnetOfHost, {}
    for fact in (Releases, PastDeploys, SystemdVersion, Identities, ConfiguredSlots, ConfiguredServices, ChosenModels):
        yield fact, {}
    for folder in (*system.FOLDERS, CONFIGURATION, *(slot.settings.node.state_dir for slot in plan.host.slots)):
        yield Directory, {"path": str(folder)}
    for file in (COMMAND, ENROLMENT_TOKEN, *plan.host.settings_files(), *_unit_files(plan)):
        yield FileContent, {"path": str(file)}
    yield WireGuard, {}
    for slot in plan.host.slots:
        if slot.hub_token is not None:
            yield FileContent, {"path": str(slot.hub_token_file)}
        if slot.identity is not None:
            yield FileContent, {"path": str(slot.settings.node.state_dir / KEY_FILE)}
    for unit in (*_services(plan), *(slot.unit for slot in plan.host.slots)):
        yield Service, {"unit": unit}


def _services(plan: Planned) -> list[str]:
    return [f"hivewright-{service}.service" for service in coordinator_host.SERVICES] if plan.host.services else []


def _unit_files(plan: Planned) -> Iterator[Path]:
    for name in (*_services(plan), *((worker.UNIT, worker.ENROL_UNIT) if plan.host.slots else ())):
        yield units.UNITS / name
    if any(slot.needs_device_files for slot in plan.host.slots):
        yield units.UNITS / units.GPU_UNIT
    for slot in plan.host.slots:
        for unit in (slot.unit, f"hivewright-enrol@{slot.number}.service"):
            yield units.UNITS / f"{unit}.d" / units.DROP_IN
