"""The host that carries a private swarm: chain, contract, bootnode, keeper, account service and dashboard."""

from collections.abc import Iterator

from pyinfra import host
from pyinfra.api import deploy, operation

from deploys import node_identity, units
from deploys.facts import CACHE, DEPLOYED, LOGS, ConfiguredServices
from deploys.inventory import validation
from deploys.inventory.planning import Planned
from deploys.inventory.validation import COORDINATOR_ROLES
from deploys.paths import RETIRED, STATE

# Service -> role whose settings it reads, in the order in which they need each other. The contract's service puts the
# contract on the chain, with the keeper's key, and is done.
SERVICES = {
    "chain": "chain", "contract": "keeper", "bootnode": "bootnode", "keeper": "keeper", "account": "account",
    "dashboard": "dashboard",
}  # fmt: skip


@deploy("Coordinator")
def configure_coordinator(plan: Planned) -> None:
    """Settings, secrets and services of what a private swarm has once."""
    token = node_identity.install_enrolment_token(plan)
    settings = {}
    for role in host.loop(COORDINATOR_ROLES):
        settings[role] = units.install_settings(validation.service_file(role), plan.host.services[role])
    for service, role in host.loop(SERVICES.items()):
        unit = f"hivewright-{service}.service"
        own = units.install_unit(unit, plan.host.deployment.watchdog_seconds)
        secrets = token if service == "account" else ""
        units.running(
            name=f"Run the {service}",
            unit=unit,
            digest=node_identity.with_token(units.digest(plan.commit, own.text, settings[role].text), secrets),
            has_new_files=own.is_new or settings[role].is_new,
            _timeout=units.RESTART_SECONDS,
        )


@deploy("Coordinator")
def retire_coordinator() -> None:
    """On a host that the inventory does not name as the coordinator: none of its services runs."""
    retire(name="Stop the coordinator's services")


@operation()
def retire() -> Iterator[str]:
    """Stop what a coordinator runs, and keep its state (the chain, the owner's key, accounts) in RETIRED."""
    if not host.get_fact(ConfiguredServices):
        host.noop("no service of a coordinator is configured")
        return
    # In the order in which they do without each other.
    names = [f"hivewright-{service}.service" for service in reversed(SERVICES)]
    files = " ".join(f"{units.UNITS}/{name} {DEPLOYED}/{name}" for name in names)
    settings = " ".join(str(validation.service_file(role)) for role in COORDINATOR_ROLES)
    folders = " ".join(COORDINATOR_ROLES)
    yield (
        f"for unit in {' '.join(names)}; do [ ! -e {units.UNITS}/$unit ] || systemctl disable --now --quiet $unit"
        f" || exit 1; done; kept={RETIRED}/coordinator-$(date +%Y%m%dT%H%M%S); mkdir -m 700 $kept || exit 1;"
        f" for role in {folders}; do [ ! -d {STATE}/$role ] || mv -T {STATE}/$role $kept/$role || exit 1;"
        f" rm -rf {CACHE}/$role {LOGS}/$role; done; rm -f {settings} {files}; systemctl daemon-reload"
    )
