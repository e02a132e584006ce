"""What an inventory says, checked: every host, every key, every mistake at once, before any host is touched.

Host data are flat keys. Those that begin with a section of the settings (`trainer_learning_rate`) become the settings
of the roles on that host; those of `Deployment` say what is installed; pyinfra's own (`ssh_user`, `_sudo`) are left
alone; anything else is a mistake. Knows nothing of pyinfra: `plan.py` hands over its inventory as plain dicts.
"""

import contextlib
import difflib
import ipaddress
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker import settings
from worker.errors import IdentityError, SettingsError
from worker.settings import Settings
from worker.swarm import identity

STATE = Path("/var/lib/hivewright")
CONFIGURATION = Path("/etc/hivewright")
ENROLMENT_TOKEN = CONFIGURATION / "enrolment.token"
ANVIL = Path("/opt/hivewright/current/anvil/anvil")

WORKERS, COORDINATORS = "workers", "coordinators"

# The sections that each role reads. Only these are in its file: a change elsewhere does not restart it.
ROLE_SECTIONS = {
    "worker": ("node", "model", "environment", "generation", "trainer", "swarm", "chain", "hub", "log"),
    "chain": ("anvil", "chain", "log"),
    "keeper": ("keeper", "chain", "anvil", "audit", "environment", "log"),  # its audits score the swarm's tasks
    "bootnode": ("bootnode", "log"),
    "account": ("account", "chain", "log"),
}
COORDINATOR_ROLES = ("chain", "keeper", "bootnode", "account")

# Settings that the deploy works out: places of its own making, one per role and slot.
DERIVED = (
    "node_state_dir", "keeper_state_dir", "bootnode_state_dir", "account_state_dir", "anvil_state_file", "anvil_binary",
    "chain_deployment_file", "chain_account_token_file", "chain_enrolment_token_file", "account_enrolment_token_file",
    "keeper_bootnode_file",
)  # fmt: skip
NO_SWARM = (
    f"no swarm to join; put a host into {COORDINATORS}, or set chain_account_url to a swarm's account service, or "
    "swarm_bootnodes to peers of one (swarm_enabled False: train alone, on purpose)"
)
SET_BY_DEPLOY = "set by the deploy for each role and slot; leave it out"


class Deployment(BaseModel):
    """The keys of host data that are not settings of a role but say what is installed, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    slots: Any = None
    """Workers on this host: a count, or a list with one dict per worker of the settings in which it differs."""
    release_repository: str | None = None
    """Git URL or folder that the hosts can fetch from. None: `origin` of the operator's checkout."""
    release_ref: str = "main"
    """Branch, tag or commit that is deployed."""
    torch_index: str | None = None
    """Package index to take torch from, such as https://download.pytorch.org/whl/cpu. None: as pip on the host says."""
    secrets_dir: str = "secrets"
    """Folder on the operator's side, relative to the checkout, that keeps what must not be in an inventory."""
    watchdog_seconds: int = Field(default=900, gt=0)
    """A worker that has not got on for so long is restarted. Longer than its slowest step."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One worker of a host. `identity`: file on the operator's side with the key that it must have; None: its own."""

    number: int
    settings: Settings
    identity: Path | None

    @property
    def unit(self) -> str:
        return f"hivewright-worker@{self.number}.service"

    @property
    def file(self) -> Path:
        return CONFIGURATION / f"worker-{self.number}.yaml"


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What a host is to become. `services`: settings of the coordinator's roles, empty on other hosts."""

    name: str
    deployment: Deployment
    slots: tuple[Slot, ...]
    services: Mapping[str, Settings]

    def settings_files(self) -> dict[Path, Settings]:
        """Every settings file that the host gets."""
        roles = {service_file(role): of for role, of in self.services.items()}
        return roles | {slot.file: slot.settings for slot in self.slots}


def credential(service: str) -> str:
    """Where systemd gives a service its copy of the enrolment token (LoadCredential); nobody else can read that."""
    return f"/run/credentials/hivewright-{service}.service/{ENROLMENT_TOKEN.name}"


def service_file(role: str) -> Path:
    """The settings file of one of the coordinator's roles."""
    return CONFIGURATION / f"{role}.yaml"


@dataclass(frozen=True, slots=True)
class HostEntry:
    """A host as the inventory has it. `foreign_keys`: the keys of its data that are pyinfra's own."""

    name: str
    groups: Collection[str]
    data: Mapping[str, Any]
    foreign_keys: Collection[str] = frozenset()


class _Mistakes:
    """Collects messages; hosts with the same mistake share a line."""

    def __init__(self) -> None:
        self._hosts: dict[str, list[str]] = {}

    def add(self, host: str, message: str) -> None:
        hosts = self._hosts.setdefault(message, [])
        if host not in hosts:
            hosts.append(host)

    def lines(self) -> list[str]:
        return [f"inventory data of {', '.join(hosts)}: {message}" for message, hosts in self._hosts.items()]


def check(entries: Collection[HostEntry]) -> dict[str, HostPlan]:
    """The plan of every host, by name. Raises SettingsError with one line for each mistake of the whole inventory."""
    mistakes = _Mistakes()
    coordinators = [entry for entry in entries if COORDINATORS in entry.groups]
    if len(coordinators) > 1:
        for entry in coordinators:
            mistakes.add(entry.name, f"{COORDINATORS}: {len(coordinators)} hosts in this group; expected one")
    plans = {}
    for entry in entries:
        deployment = _deployment(entry, mistakes)
        wrong = _wrong_settings(entry)
        for message in wrong:
            mistakes.add(entry.name, message)
        slots = _slots(entry, coordinators, wrong, mistakes)
        if not wrong:
            plans[entry.name] = HostPlan(entry.name, deployment, slots, _services(entry))
    _check_identities(entries, mistakes)
    if lines := mistakes.lines():
        raise SettingsError("\n".join(lines))
    return plans


def _deployment(entry: HostEntry, mistakes: _Mistakes) -> Deployment:
    if not {WORKERS, COORDINATORS} & set(entry.groups):
        mistakes.add(entry.name, f"in no group that gets anything; put the host into {WORKERS} or {COORDINATORS}")
    for key in sorted(entry.data):
        if key in DERIVED:
            mistakes.add(entry.name, f"{key}: {SET_BY_DEPLOY}")
        elif not (key in entry.foreign_keys or key in Deployment.model_fields or _section(key)):
            known = [*Deployment.model_fields, *settings.flat_keys(), *entry.foreign_keys]
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "docs/configuration.md lists all keys"
            mistakes.add(entry.name, f"{key}: not a known key; {hint}")
    try:
        return Deployment(**{key: value for key, value in entry.data.items() if key in Deployment.model_fields})
    except ValidationError as error:
        for problem in error.errors():
            expected = problem["msg"].removeprefix("Input should be ")
            mistakes.add(entry.name, f"{problem['loc'][0]}: got {problem['input']!r}; expected {expected}")
        return Deployment(slots=entry.data.get("slots"))


def _section(key: str) -> str | None:
    """The section of the settings that a key belongs to, by its looks. None: it is no setting."""
    section, _, name = key.partition("_")
    return section if name and section in settings.SECTIONS else None


def _wrong_settings(entry: HostEntry) -> list[str]:
    """What is wrong with the settings in the host's data, also with those of roles that it does not have."""
    return settings.flat_mistakes(
        {key: value for key, value in entry.data.items() if _section(key) and key not in DERIVED}
    )


def _slots(
    entry: HostEntry, coordinators: Collection[HostEntry], wrong: Collection[str], mistakes: _Mistakes
) -> tuple[Slot, ...]:
    """`wrong`: what is known to be wrong with the host's own settings, and would be so again in each slot."""
    count = entry.data.get("slots")
    if WORKERS not in entry.groups:
        if count is not None:
            mistakes.add(
                entry.name, f"slots: got {count!r}, but not in {WORKERS}; put the host there, or leave slots out"
            )
        return ()
    if count is None or count == 0 or count == []:
        mistakes.add(
            entry.name, f"slots: none; expected a count of at least 1, or a list of dicts, for a host in {WORKERS}"
        )
        return ()
    overrides = _overrides(entry)
    if overrides is None:
        mistakes.add(entry.name, f"slots: got {count!r}; expected a count, or a list with a dict of settings for each")
        return ()
    _check_ports(entry, overrides, mistakes)
    account_url = _account_url(entry, coordinators, mistakes)
    slots = []
    for number, own in enumerate(overrides):
        flat = _slot_settings(entry, number, own, account_url)
        if not coordinators and _is_lonely(flat):
            mistakes.add(entry.name, NO_SWARM)
        for key in sorted(set(DERIVED) & set(own)):
            mistakes.add(entry.name, f"slot {number}: {key}: {SET_BY_DEPLOY}")
        own_wrong = settings.flat_mistakes(flat)
        for message in own_wrong:
            if message not in wrong:
                mistakes.add(entry.name, f"slot {number}: {message}")
        if not own_wrong:
            key_file = own.get("identity")
            slots.append(Slot(number, settings.from_flat(flat, ""), Path(str(key_file)) if key_file else None))
    return tuple(slots)


def _overrides(entry: HostEntry) -> list[dict[str, Any]] | None:
    """For each slot of the host the settings in which it differs. None: its `slots` says nothing of the kind."""
    slots = entry.data.get("slots")
    if isinstance(slots, int) and not isinstance(slots, bool) and slots > 0:
        return [{} for _ in range(slots)]
    if isinstance(slots, list) and all(isinstance(slot, dict) for slot in slots):
        return slots
    return None


def _slot_settings(entry: HostEntry, number: int, own: dict[str, Any], account_url: str | None) -> dict[str, Any]:
    flat = _role_settings(entry, "worker") | {key: value for key, value in own.items() if key != "identity"}
    flat.setdefault("node_name", _node_name(entry.name, number))
    if account_url:
        flat.setdefault("chain_account_url", account_url)
    if "chain_account_url" in flat:
        flat["chain_enrolment_token_file"] = credential(f"enrol@{number}")
    flat["node_state_dir"] = str(STATE / f"worker-{number}")
    return flat


def _is_lonely(flat: Mapping[str, Any]) -> bool:
    """Whether a worker with these settings could never hear of another one, though it is to."""
    ways = ("chain_account_url", "chain_rpc_url", "swarm_bootnodes")
    return flat.get("swarm_enabled", True) is True and not any(flat.get(way) for way in ways)


def _check_ports(entry: HostEntry, overrides: list[dict[str, Any]], mistakes: _Mistakes) -> None:
    users: dict[int, int] = {}
    for number, own in enumerate(overrides):
        port = own.get("swarm_port", entry.data.get("swarm_port"))
        if isinstance(port, int) and port and (other := users.setdefault(port, number)) != number:
            taken = f"swarm_port: {port} is that of slot {other} too; give each its own, or 0"
            mistakes.add(entry.name, f"slot {number}: {taken}")


def _services(entry: HostEntry) -> dict[str, Settings]:
    """Settings of the coordinator's roles, from data that are known to be right."""
    if COORDINATORS not in entry.groups:
        return {}
    deployment_file = str(STATE / "keeper/deployment.json")
    derived: dict[str, dict[str, Any]] = {
        "chain": {"anvil_state_file": str(STATE / "chain/state.json"), "anvil_binary": str(ANVIL)},
        "keeper": {
            "keeper_state_dir": str(STATE / "keeper"),
            "keeper_bootnode_file": str(STATE / "bootnode/multiaddr"),
            "chain_deployment_file": deployment_file,
        },
        "bootnode": {"bootnode_state_dir": str(STATE / "bootnode"), **_announced(entry)},
        "account": {
            "account_state_dir": str(STATE / "account"),
            "account_enrolment_token_file": credential("account"),
            "chain_deployment_file": deployment_file,
        },
    }
    services = {}
    for role, own in derived.items():
        # account_url is for those that have no way to the chain; these roles are beside it.
        flat = {key: value for key, value in _role_settings(entry, role).items() if key != "chain_account_url"}
        services[role] = settings.from_flat(flat | own, entry.name)
    return services


def _role_settings(entry: HostEntry, role: str) -> dict[str, Any]:
    """The keys of the host's data that the role reads."""
    return {
        key: value for key, value in entry.data.items() if _section(key) in ROLE_SECTIONS[role] and key not in DERIVED
    }


def _announced(entry: HostEntry) -> dict[str, list[str]]:
    """The bootnode's address for others: where they reach the account service too, unless the inventory names one."""
    host, port = entry.data.get("account_host", "localhost"), entry.data.get("bootnode_port", settings.Bootnode().port)
    if "bootnode_announce" in entry.data or not port or not _is_reachable(host):
        return {}
    kind = "dns"
    with contextlib.suppress(ValueError):
        kind = f"ip{ipaddress.ip_address(str(host)).version}"
    return {"bootnode_announce": [f"/{kind}/{host}/tcp/{port}"]}


def _account_url(entry: HostEntry, coordinators: Collection[HostEntry], mistakes: _Mistakes) -> str | None:
    """Where this host's workers find the inventory's own account service. None: as their data say, or nowhere."""
    if "chain_account_url" in entry.data or "chain_rpc_url" in entry.data or len(coordinators) != 1:
        return None
    coordinator = next(iter(coordinators))
    host = coordinator.data.get("account_host", settings.Account().host)
    port = coordinator.data.get("account_port", settings.Account().port)
    if entry.name != coordinator.name and not _is_reachable(host):
        mistakes.add(
            coordinator.name,
            f"account_host: got {host!r}, which says nothing to workers on other hosts; expected the address at which "
            "they reach this one",
        )
        return None
    return f"http://{f'[{host}]' if ':' in str(host) else host}:{port}"


def _is_reachable(host: object) -> bool:
    """Whether other hosts can make something of this address to listen on."""
    try:
        address = ipaddress.ip_address(str(host))
    except ValueError:
        return host != "localhost"
    return not (address.is_unspecified or address.is_loopback)


def _node_name(host: str, number: int) -> str:
    """The host's name, and a number from the second slot on: a slot that comes later renames nobody."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", host).strip("-._")[:50] or "worker"
    return f"{name}-{number}" if number else name


def _check_identities(entries: Collection[HostEntry], mistakes: _Mistakes) -> None:
    """One key is one worker: the same key twice would be two nodes that claim one reward."""
    users: dict[str, str] = {}
    for entry in entries:
        for number, own in enumerate(_overrides(entry) or ()):
            peer_id = None
            try:
                peer_id = _peer_id(own.get("identity"))
            except SettingsError as error:
                mistakes.add(entry.name, f"slot {number}: identity: {error}; expected the path of a swarm.pem")
            if peer_id in users:
                twin = f"{own['identity']} is the key of {users[peer_id]} too; two workers can't be one node"
                mistakes.add(entry.name, f"slot {number}: identity: {twin}")
            if peer_id:
                users.setdefault(peer_id, f"slot {number} of {entry.name}")


def _peer_id(key_file: object) -> str | None:
    """Whose key is in a file. None: no file is named. Raises SettingsError, with the reason only, if it is no key."""
    if key_file is None:
        return None
    if not isinstance(key_file, str):
        raise SettingsError(f"got {key_file!r}")
    try:
        Path(key_file).read_bytes()
        return identity.load(Path(key_file)).peer_id
    except OSError as error:
        raise SettingsError(f"{key_file}: {error.strerror}") from None
    except IdentityError:
        raise SettingsError(f"{key_file}: no libp2p RSA key") from None
