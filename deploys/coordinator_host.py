"""The coordinator host: settings, secrets and units of the services in services.py."""

from collections.abc import Collection, Iterator

from pyinfra import host
from pyinfra.api import deploy, operation
from pyinfra.operations import files

from deploys import account_secrets, answers_view, host_files, node_identity, paths, units
from deploys.facts import ConfiguredServices
from deploys.inventory import scrape_targets
from deploys.inventory.host_plan import Planned
from deploys.paths import (
    CACHE,
    DEPLOYED,
    ENROLMENT_TOKEN,
    LOGS,
    PROMETHEUS,
    RETIRED,
    STATE,
    TARGETS_FILE,
)
from deploys.services import (
    COORDINATOR_ROLES,
    COORDINATOR_UNITS,
    DASHBOARD_UNIT,
    Service,
    services_of,
)


@deploy("Coordinator")
def configure_coordinator(plan: Planned) -> None:
    """Install settings, secrets and services of the coordinator."""
    token = node_identity.install_enrolment_token(plan)
    files.directory(name=f"Make {PROMETHEUS}", path=str(PROMETHEUS), mode="755")
    host_files.file(
        name="Write the targets of Prometheus",
        path=PROMETHEUS / TARGETS_FILE,
        content=scrape_targets.render(plan.targets, plan.host.name).encode(),
    )
    settings = {}
    for role, own_settings in host.loop(plan.host.services.items()):
        settings[role] = units.install_settings(COORDINATOR_ROLES[role].file, own_settings)
    for service in host.loop(services_of(plan.host.services)):
        own = units.install_unit(service.unit, plan.host.deployment.watchdog_seconds)
        read = settings[service.role]
        given = _given(plan, service)
        secrets = token if ENROLMENT_TOKEN in service.credentials else ""
        units.running(
            name=f"Run the {service.name}",
            unit=service.unit,
            digest=node_identity.with_token(
                units.digest(plan.commit, own.text, read.text, *given.digests), secrets
            ),
            has_new_files=own.is_new or read.is_new or given.is_new,
            _timeout=units.RESTART_SECONDS,
        )
    stop_unused(name="Stop services without a task", roles=list(plan.host.services))


@operation()
def stop_unused(roles: Collection[str]) -> Iterator[str]:
    """Remove the coordinator's services of all other roles; their state stays."""
    configured = host.get_fact(ConfiguredServices)
    unused = [role for role in configured if role in COORDINATOR_ROLES and role not in roles]
    if not unused:
        host.noop("every service has a task")
    for service in services_of(unused):
        unit = f"{paths.UNITS}/{service.unit}"
        # The settings come last: while they exist, the next run completes an interrupted one.
        yield (
            f"{{ [ ! -e {unit} ] || systemctl disable --now --quiet {service.unit}; }} && rm -f"
            f" {unit} {DEPLOYED}/{service.unit} && systemctl daemon-reload && rm -f {service.file}"
        )


def _given(plan: Planned, service: Service) -> account_secrets.Given:
    """Write the drop-in of a service that has one: for its secrets, or for workers' answers."""
    if service.unit != DASHBOARD_UNIT:
        return account_secrets.install(plan, service)
    text = answers_view.drop_in_text(plan.host.services["dashboard"].dashboard.node_dirs)
    name = "Show the dashboard the answers of this host's slots"
    written = units.drop_in(name=name, unit=service.unit, text=text)
    return account_secrets.Given((text,) if text else (), written.will_change)


@deploy("Coordinator")
def retire_coordinator() -> None:
    """Stop the coordinator's services on a host that is no longer the coordinator."""
    retire(name="Stop the coordinator's services")


@operation()
def retire() -> Iterator[str]:
    """Stop all services of a coordinator, and move its state to RETIRED."""
    if not host.get_fact(ConfiguredServices):
        host.noop("no service of a coordinator is configured")
        return
    # Stopped in the reverse order of their dependencies.
    names = COORDINATOR_UNITS[::-1]
    files = " ".join(f"{paths.UNITS}/{name} {DEPLOYED}/{name}" for name in names)
    settings = " ".join(str(service.file) for service in COORDINATOR_ROLES.values())
    folders = " ".join(COORDINATOR_ROLES)
    yield (
        f"for unit in {' '.join(names)}; do [ ! -e {paths.UNITS}/$unit ] || systemctl disable --now"
        f" --quiet $unit || exit 1; done; kept={RETIRED}/coordinator-$(date +%Y%m%dT%H%M%S); mkdir"
        f" -m 700 $kept || exit 1; for role in {folders}; do [ ! -d {STATE}/$role ] || mv -T"
        f" {STATE}/$role $kept/$role || exit 1; rm -rf {CACHE}/$role {LOGS}/$role; done; rm -rf"
        f" {settings} {files} {PROMETHEUS}; systemctl daemon-reload"
    )
