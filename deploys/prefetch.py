"""Prefetch the facts that a deploy needs from a host (deploys/pyinfra_ext/fact_cache.py).

A fact that is missing here is read when it is needed, which only costs a round trip.
"""

from collections.abc import Iterator
from pathlib import Path

from pyinfra.context import ctx_host
from pyinfra.facts.files import Directory

from deploys import account_secrets, locks, paths, system, units
from deploys.facts import (
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
from deploys.inventory.host_plan import Planned
from deploys.paths import (
    COMMAND,
    CONFIGURATION,
    ENROLMENT_TOKEN,
    KEY_FILE,
    PROMETHEUS,
    TARGETS_FILE,
    UNITS,
)
from deploys.pyinfra_ext import fact_cache
from deploys.pyinfra_ext.fact_cache import Question
from deploys.services import (
    ACCOUNT_UNIT,
    DASHBOARD_UNIT,
    GPU_UNIT,
    enrol_unit,
    services_of,
    units_of,
)
from deploys.tailscale.join import TailnetOfHost


def ask(plan: Planned) -> None:
    """Prefetch the facts of the current host that its deploy will need."""
    fact_cache.ask_ahead(ctx_host.get(), _questions(plan))


def _questions(plan: Planned) -> Iterator[Question]:
    python = system.python_of(ctx_host.get().get_fact(Distribution))
    yield InstalledPackages, {"names": system.packages_on(python, bool(plan.host.services))}
    yield locks.HostLock, {}
    yield UserEntry, {"user": paths.USER}
    if plan.host.deployment.tailscale:
        yield TailnetOfHost, {}
    for fact in (
        Releases,
        PastDeploys,
        SystemdVersion,
        Identities,
        ConfiguredSlots,
        ConfiguredServices,
        ChosenModels,
    ):
        yield fact, {}
    for folder in (
        *system.FOLDERS,
        CONFIGURATION,
        *(slot.settings.node.state_dir for slot in plan.host.slots),
    ):
        yield Directory, {"path": str(folder)}
    for file in (COMMAND, ENROLMENT_TOKEN, *plan.host.settings_files(), *_unit_files(plan)):
        yield FileContent, {"path": str(file)}
    if plan.host.services:
        yield Directory, {"path": str(PROMETHEUS)}
        yield FileContent, {"path": str(PROMETHEUS / TARGETS_FILE)}
    yield WireGuard, {}
    for slot in plan.host.slots:
        for key in slot.secrets:
            yield FileContent, {"path": str(slot.secret_file(key))}
        if slot.identity is not None:
            yield FileContent, {"path": str(slot.settings.node.state_dir / KEY_FILE)}
    for key in plan.host.account_secrets:
        yield FileContent, {"path": str(account_secrets.file_of(key))}
    for unit in (
        *(service.unit for service in services_of(plan.host.services)),
        *(slot.unit for slot in plan.host.slots),
    ):
        yield Service, {"unit": unit}


def _unit_files(plan: Planned) -> Iterator[Path]:
    for name in units_of(plan.host.services, is_worker=bool(plan.host.slots)):
        yield UNITS / name
    if any(slot.needs_device_files for slot in plan.host.slots):
        yield UNITS / GPU_UNIT
    if plan.host.services:
        for unit in (ACCOUNT_UNIT, DASHBOARD_UNIT):
            yield UNITS / f"{unit}.d" / units.DROP_IN
    for slot in plan.host.slots:
        for unit in (slot.unit, enrol_unit(slot.number)):
            yield UNITS / f"{unit}.d" / units.DROP_IN
