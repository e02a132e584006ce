"""A host's entry in the inventory, and the plans that are made from it."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploys.gpus import Gpus
from deploys.inventory.schema import Deployment
from deploys.inventory.secret_files import SLOT_SECRETS
from deploys.inventory.slots import Slot, place, with_answers
from deploys.mesh import Member
from deploys.paths import ANVIL, credential, market_record, state_dir
from deploys.services import COORDINATOR_ROLES
from worker.errors import SettingsError
from worker.settings import Settings

WORKERS, COORDINATORS = "workers", "coordinators"
MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class HostEntry:
    """A host's entry in the inventory; `foreign_keys`: keys in its data that pyinfra reads."""

    name: str
    groups: Collection[str]
    data: Mapping[str, Any]
    foreign_keys: Collection[str] = frozenset()


@dataclass(frozen=True, slots=True)
class HostPlan:
    """The plan of a host.

    `services`: settings of the coordinator's roles, empty on other hosts. `has_auto_slots`: the
    number of slots depends on the host's GPUs; `slots` then contains the first one.
    `account_secrets`: local files with secrets of the account service, by key of the inventory.
    """

    name: str
    deployment: Deployment
    slots: tuple[Slot, ...]
    services: Mapping[str, Settings]
    has_auto_slots: bool = False
    account_secrets: Mapping[str, Path] = field(default_factory=dict)

    def on(self, gpus: Gpus) -> "HostPlan":
        """Assign GPUs to slots.

        Raises SettingsError, with a line for each slot without a GPU or a port.
        """
        slots = self.slots
        if self.has_auto_slots:
            num_slots = max(1, len(gpus.cards)) if slots[0].wants_gpu else 1
            slots = tuple(self._nth_slot(number) for number in range(num_slots))
            if mistakes := list(clashes(slots, self.services)):
                raise SettingsError("\n".join(mistakes))
        placed = place(slots, gpus)
        return replace(self, slots=placed, services=with_answers(self.services, placed))

    def _nth_slot(self, number: int) -> Slot:
        """Return a copy of the first slot, with the name, folder and port of its number."""
        settings = self.slots[0].settings
        node = {"name": nth_name(settings.node.name, number), "state_dir": state_dir(number)}
        port = settings.swarm.port + number if settings.swarm.port else 0
        record = {"record_file": market_record(number)}
        own = {
            "market": settings.market.model_copy(update=record),
            "node": settings.node.model_copy(update=node),
            "swarm": settings.swarm.model_copy(update={"port": port}),
        }
        if settings.metrics.port:
            endpoint = {"port": settings.metrics.port + number}
            own["metrics"] = settings.metrics.model_copy(update=endpoint)
        for key in self.slots[0].secrets:
            section, _, name = key.partition("_")
            file = {name: Path(credential(f"worker@{number}", SLOT_SECRETS[key]))}
            own[section] = getattr(settings, section).model_copy(update=file)
        return replace(self.slots[0], number=number, settings=settings.model_copy(update=own))

    @property
    def needs_anvil(self) -> bool:
        """True if the deploy installs the chain's program, because the inventory names no other."""
        return bool(self.services) and self.services["chain"].anvil.binary == ANVIL

    @property
    def has_trackers(self) -> bool:
        """True if a slot needs the packages of trackers (tracking.*)."""
        return any(slot.settings.tracking.is_on for slot in self.slots)

    def settings_files(self) -> dict[Path, Settings]:
        """Return every settings file that the host gets."""
        roles = {COORDINATOR_ROLES[role].file: own for role, own in self.services.items()}
        return roles | {slot.file: slot.settings for slot in self.slots}


@dataclass(frozen=True, slots=True)
class Target:
    """The endpoint of one process for Prometheus.

    `address`: HOST:PORT for other hosts; None: it listens on loopback, so only a Prometheus on its
    own host can scrape it. `slot`: number of a worker's slot, None for another service.
    """

    host: str
    service: str
    port: int
    address: str | None
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """A host's plan with the commit it gets and the fleet's enrolment token (None: it has none).

    `mesh`: the members of the fleet's WireGuard mesh, by host; this host need not be one.
    `targets`: the fleet's endpoints for Prometheus. `torch_index`: the package index of the build
    of torch that fits the host; None: as pip is configured on the host or, for a wheelhouse, here.
    `unfit`: why the host's facts contradict the plan; None: they do not.
    """

    host: HostPlan
    repository: str
    commit: str
    token: str | None = field(repr=False)
    mesh: Mapping[str, Member] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    torch_index: str | None = None
    unfit: str | None = None


def nth_name(name: str, number: int) -> str:
    """Append the number, except for slot 0, so that adding slots does not rename the first."""
    return f"{name}-{number}" if number else name


def clashes(
    slots: Collection[Slot],
    services: Mapping[str, Settings],
) -> Iterator[str]:
    """Yield ports and announced addresses that two services of one host share."""
    users: dict[object, str] = {}
    for key, user, port in _ports(slots, services):
        if port > MAX_PORT:
            yield f"{key}: got {port}, counted up from slot 0's; expected at most {MAX_PORT}"
        elif port:
            other = users.setdefault(port, user)
            if other != user:
                yield f"{key}: {port} is that of {other} too; give each its own, or 0"
    for slot in slots:
        user = f"slot {slot.number}"
        for address in slot.settings.swarm.announce:
            other = users.setdefault(address, user)
            if other != user:
                yield (
                    f"{user}: swarm_announce: {address} is that of {other} too; give each its own"
                    " in a list of slots, or set swarm_announce_interface"
                )


def _ports(
    slots: Collection[Slot], services: Mapping[str, Settings]
) -> Iterator[tuple[str, str, int]]:
    """Yield key, user and number of each port; 0: any free port."""
    for role, settings in services.items():
        for key in COORDINATOR_ROLES[role].ports:
            section, _, name = key.partition("_")
            yield key, key, getattr(getattr(settings, section), name)
        yield f"metrics_port of the {role}", f"metrics of the {role}", settings.metrics.port or 0
    for slot in slots:
        user = f"slot {slot.number}"
        yield f"{user}: swarm_port", user, slot.settings.swarm.port
        metrics_port = slot.settings.metrics.port or 0
        yield f"{user}: metrics_port", f"{user} (metrics)", metrics_port
