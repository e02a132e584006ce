"""The services of a private swarm, one record each, from which deploys derive everything.

Units, settings files, ports, prefetched facts, the digest of a deploy, rollback, uninstall and
backup follow from the records. Also used on hosts (backup_pack.py), so it imports nothing but
paths.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploys.paths import (
    ENROLMENT_TOKEN,
    PROMETHEUS,
    STATE,
    TARGETS_FILE,
    credential,
    settings_file,
)

DEPLOYMENT = STATE / "keeper/deployment.json"
# The file with the chain's address and contract, but not the owner's key next to it.
CONTRACT = (STATE / "chain/rpc", DEPLOYMENT)


@dataclass(frozen=True, slots=True)
class Service:
    """A systemd service of the coordinator host.

    Its unit is templates/service.j2, or its own template that changes blocks of that.
    `description`: its task, for systemd. `command`: its hivewright command, if that is not `name`.
    `wants`: services without which it has nothing to do; it starts after them and those in `after`.
    `reads`: folders of other services that it may see (otherwise only its own); `hides`: exceptions
    within these. `sections`: sections of the settings in its file; other changes do not restart it.
    A service without sections reads the file of the service `settings_of`, and uses that service's
    folders. `ports`: settings with a port that it listens on, which must differ on a host. `files`:
    settings with paths on the host that the deploy fills in and an inventory must not set.
    `credentials`: root's files that systemd passes to it. `is_backed_up`: its state cannot be
    recreated, so an uninstall keeps it and a backup includes it.
    """

    name: str
    description: str
    command: str = ""
    wants: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()
    hides: tuple[Path, ...] = ()
    sections: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    credentials: tuple[Path, ...] = ()
    settings_of: str = ""
    is_backed_up: bool = True

    @property
    def unit(self) -> str:
        return unit_of(self.name)

    @property
    def role(self) -> str:
        """The service whose settings it reads, usually itself."""
        return self.settings_of or self.name

    @property
    def arguments(self) -> str:
        """Its command line after `hivewright`."""
        return f"{self.command or self.name} --settings {self.file}"

    @property
    def file(self) -> Path:
        """Its settings file."""
        return settings_file(self.role)


def unit_of(name: str) -> str:
    """Return the unit of the service `name`."""
    return f"hivewright-{name}.service"


# In the order of their dependencies.
COORDINATOR_SERVICES = (
    Service(
        "chain",
        "the embedded EVM node",
        command="chain up",
        sections=("anvil", "chain", "log", "metrics"),
        ports=("anvil_port",),
        files={"anvil_state_file": STATE / "chain/state.json"},
    ),
    Service(
        "contract",
        "puts the coordinator contract on the chain, or upgrades it",  # with the keeper's key
        command="chain deploy",
        wants=("chain",),
        reads=(STATE / "chain", STATE / "bootnode"),
        settings_of="keeper",
    ),
    Service(
        "bootnode",
        "the address through which workers find each other",
        sections=("bootnode", "log", "metrics"),
        ports=("bootnode_port",),
        files={"bootnode_state_dir": STATE / "bootnode"},
    ),
    Service(
        "keeper",
        "advances the rounds, publishes the bootnodes",
        wants=("contract",),
        after=("bootnode",),
        reads=(STATE / "chain", STATE / "bootnode"),
        # Its audits score the swarm's tasks.
        sections=("keeper", "chain", "anvil", "audit", "market", "environment", "log", "metrics"),
        files={
            "keeper_state_dir": STATE / "keeper",
            "keeper_bootnode_file": STATE / "bootnode/multiaddr",
            "chain_deployment_file": DEPLOYMENT,
        },
    ),
    Service(
        "account",
        "signs and sends for all nodes",
        wants=("contract",),
        reads=CONTRACT,
        sections=("account", "chain", "market", "log", "metrics"),
        ports=("account_port",),
        files={
            "account_state_dir": STATE / "account",
            "account_enrolment_token_file": Path(credential("account")),
            "chain_deployment_file": DEPLOYMENT,
        },
        credentials=(ENROLMENT_TOKEN,),
    ),
    Service(
        "dashboard",
        "the page about the swarm",
        wants=("contract",),
        after=("keeper",),
        # The report of audits, and the fleet's endpoints.
        reads=(*CONTRACT, STATE / "keeper/audit", PROMETHEUS),
        hides=(STATE / "keeper/audit/auditor.pem",),
        sections=("dashboard", "chain", "market", "log", "metrics"),
        ports=("dashboard_port",),
        files={
            "dashboard_state_dir": STATE / "dashboard",
            "dashboard_audit_file": STATE / "keeper/audit/audit.json",
            "dashboard_targets_file": PROMETHEUS / TARGETS_FILE,
            "chain_deployment_file": DEPLOYMENT,
        },
        is_backed_up=False,
    ),
    Service(
        "judge",
        "the prediction market's games",
        wants=("contract",),
        reads=(*CONTRACT, STATE / "keeper/judge.key"),
        sections=("judge", "chain", "market", "environment", "log", "metrics"),
        ports=("judge_port",),
        files={
            "judge_state_dir": STATE / "judge",
            "judge_key_file": STATE / "keeper/judge.key",
            "chain_deployment_file": DEPLOYMENT,
        },
        # If a game is lost, all bets are returned.
        is_backed_up=False,
    ),
)
ACCOUNT_UNIT = "hivewright-account.service"
DASHBOARD_UNIT = "hivewright-dashboard.service"
COORDINATOR_UNITS = tuple(service.unit for service in COORDINATOR_SERVICES)
# Services with their own settings and folders, by name.
COORDINATOR_ROLES = {
    service.name: service for service in COORDINATOR_SERVICES if not service.settings_of
}
# Folders below STATE whose content can't be recreated.
BACKED_UP = tuple(name for name, service in COORDINATOR_ROLES.items() if service.is_backed_up)

WORKER_SECTIONS = (
    "node",
    "model",
    "environment",
    "generation",
    "trainer",
    "swarm",
    "chain",
    "market",
    "hub",
    "log",
    "metrics",
    "tracking",
)
# Settings that the deploy fills in for each slot.
WORKER_FILES = (
    "node_state_dir",
    "chain_deployment_file",
    "chain_account_token_file",
    "chain_enrolment_token_file",
    "model_shared_dir",
    "market_record_file",
)
WORKER_UNIT = "hivewright-worker@.service"
ENROL_UNIT = "hivewright-enrol@.service"
# Makes the device files of NVIDIA's driver before workers start, on hosts where a slot needs them.
GPU_UNIT = "hivewright-gpu.service"

# Settings that an inventory may not have: the deploy fills them in for each service and slot.
DERIVED = {*WORKER_FILES, *(key for service in COORDINATOR_SERVICES for key in service.files)}


def worker_unit(slot: int) -> str:
    return f"hivewright-worker@{slot}.service"


def enrol_unit(slot: int) -> str:
    return f"hivewright-enrol@{slot}.service"


def services_of(roles: Collection[str]) -> list[Service]:
    """Return the services of a coordinator with these roles."""
    return [service for service in COORDINATOR_SERVICES if service.role in roles]


def units_of(
    roles: Collection[str],
    *,
    is_worker: bool,
) -> list[str]:
    """Return the unit files of a host: `roles` are those of a coordinator, on others none."""
    worker = (WORKER_UNIT, ENROL_UNIT) if is_worker else ()
    return [*(service.unit for service in services_of(roles)), *worker]
