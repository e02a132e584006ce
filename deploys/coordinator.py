"""The host that carries a private swarm: chain, contract, bootnode, keeper, account service and dashboard."""

from pyinfra import host
from pyinfra.api import deploy

from deploys import hosts, identity, units
from deploys.hosts import COORDINATOR_ROLES
from deploys.plan import Planned

# Service -> role whose settings it reads, in the order in which they need each other. The contract's service puts the
# contract on the chain, with the keeper's key, and is done.
SERVICES = {
    "chain": "chain", "contract": "keeper", "bootnode": "bootnode", "keeper": "keeper", "account": "account",
    "dashboard": "dashboard",
}  # fmt: skip


@deploy("Coordinator")
def configure_coordinator(plan: Planned) -> None:
    """Settings, secrets and services of what a private swarm has once."""
    token = identity.install_enrolment_token(plan)
    settings = {}
    for role in host.loop(COORDINATOR_ROLES):
        settings[role] = units.install_settings(hosts.service_file(role), plan.host.services[role])
    for service, role in host.loop(SERVICES.items()):
        unit = f"hivewright-{service}.service"
        own = units.install_unit(unit, plan.host.deployment.watchdog_seconds)
        secrets = token if service == "account" else ""
        units.running(
            name=f"Run the {service}",
            unit=unit,
            digest=units.digest(plan.commit, own.text, settings[role].text, secrets),
            has_new_files=own.is_new or settings[role].is_new,
            _timeout=units.RESTART_SECONDS,
        )
