"""Validation of an inventory: every mistake of every host at once, before any host is touched.

Host data are flat keys. Those that begin with a section of the settings (`trainer_learning_rate`)
become settings of the roles on that host; those of `Deployment` determine what is installed;
pyinfra's own (`ssh_user`, `_sudo`) are ignored; anything else is a mistake. Independent of pyinfra:
`planning.py` passes its inventory as plain dicts.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from deploys import mesh
from deploys.gpus import Gpus
from deploys.inventory import key_files, secret_files
from deploys.inventory.addresses import bootnode_announce, is_reachable
from deploys.inventory.schema import AUTO, SLOTS_MAY_BE, WHOLE_MESSAGE, Deployment
from deploys.inventory.secret_files import HUB_TOKEN
from deploys.inventory.slots import Slot, SlotOptions, place, with_families
from deploys.paths import ANVIL, MODELS, credential, state_dir
from deploys.services import COORDINATOR_ROLES, DERIVED, WORKER_SECTIONS
from deploys.tailscale import tailnet
from worker import settings
from worker.errors import SettingsError
from worker.settings import Settings

WORKERS, COORDINATORS = "workers", "coordinators"

NO_SWARM = (
    f"no swarm to join; put a host into {COORDINATORS}, or set chain_account_url to a swarm's"
    " account service, or swarm_bootnodes to peers of one (swarm_enabled False: train alone, on"
    " purpose)"
)
# Through the account service a look at the chain costs a worker a request over the network, and
# rounds last minutes.
WORKER_POLL_SECONDS = 3.0
MAX_PORT = 65535
# As huggingface_hub has it, which is not needed on this side.
_HUB_NAME = re.compile(r"(?!.*(--|[.][.]|[.]git$))(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b")
# Keys of a slot besides settings.
SLOT_KEYS = ("identity", *SlotOptions.model_fields)
EXPECTED_URL = "not a URL; expected one such as https://git.example.org/hivewright.git"
SET_BY_DEPLOY = "set by the deploy for each role and slot; leave it out"


@dataclass(frozen=True, slots=True)
class HostPlan:
    """The plan of a host.

    `services`: settings of the coordinator's roles, empty on other hosts. `has_auto_slots`: the
    number of slots depends on the host's GPUs; `slots` then contains the first one.
    """

    name: str
    deployment: Deployment
    slots: tuple[Slot, ...]
    services: Mapping[str, Settings]
    has_auto_slots: bool = False

    def on(self, gpus: Gpus) -> "HostPlan":
        """Assign GPUs to slots.

        Raises SettingsError, with a line for each slot without a GPU or a port.
        """
        slots = self.slots
        if self.has_auto_slots:
            num_slots = max(1, len(gpus.cards)) if slots[0].wants_gpu else 1
            slots = tuple(self._nth_slot(number) for number in range(num_slots))
            if wrong := list(clashes(slots, self.services)):
                raise SettingsError("\n".join(wrong))
        return replace(self, slots=place(slots, gpus))

    def _nth_slot(self, number: int) -> Slot:
        """Return a copy of the first slot, with the name, folder and port of its number."""
        settings = self.slots[0].settings
        node = {"name": _nth_name(settings.node.name, number), "state_dir": state_dir(number)}
        hub = (
            {"token_file": Path(credential(f"worker@{number}", HUB_TOKEN))}
            if settings.hub.token_file
            else {}
        )
        port = settings.swarm.port + number if settings.swarm.port else 0
        own = {
            "node": settings.node.model_copy(update=node),
            "swarm": settings.swarm.model_copy(update={"port": port}),
            "hub": settings.hub.model_copy(update=hub),
        }
        return replace(self.slots[0], number=number, settings=settings.model_copy(update=own))

    @property
    def needs_anvil(self) -> bool:
        """Whether the deploy installs the chain's program, because the inventory names no other."""
        return bool(self.services) and self.services["chain"].anvil.binary == ANVIL

    def settings_files(self) -> dict[Path, Settings]:
        """Return every settings file that the host gets."""
        roles = {COORDINATOR_ROLES[role].file: own for role, own in self.services.items()}
        return roles | {slot.file: slot.settings for slot in self.slots}


@dataclass(frozen=True, slots=True)
class HostEntry:
    """A host as the inventory has it; `foreign_keys` are keys in its data that pyinfra reads."""

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
        return [
            f"inventory data of {', '.join(hosts)}: {message}"
            for message, hosts in self._hosts.items()
        ]


def check(entries: Collection[HostEntry]) -> dict[str, HostPlan]:
    """Return the plan of every host. Raises SettingsError, with a line for each mistake."""
    mistakes = _Mistakes()
    coordinators = [entry for entry in entries if COORDINATORS in entry.groups]
    if len(coordinators) > 1:
        for entry in coordinators:
            mistakes.add(
                entry.name, f"{COORDINATORS}: {len(coordinators)} hosts in this group; expected one"
            )
    plans, deployments = {}, {}
    whole = [entry for entry in entries if _is_whole(entry, mistakes)]
    for entry in whole:
        deployment = deployments[entry.name] = _deployment(entry, mistakes)
        wrong = _wrong_settings(entry)
        for message in wrong:
            mistakes.add(entry.name, message)
        slots = _slots(entry, deployment, coordinators, wrong, mistakes)
        if not wrong:
            is_auto = bool(slots) and deployment.slots == AUTO
            services = _services(entry, deployment)
            for message in clashes(slots, services):
                mistakes.add(entry.name, message)
            plans[entry.name] = HostPlan(entry.name, deployment, slots, services, is_auto)
    all_slots = [slot for plan in plans.values() for slot in plan.slots]
    plans = {
        name: replace(plan, services=with_families(plan.services, all_slots))
        for name, plan in plans.items()
    }
    identities = {
        (each.name, n): own["identity"]
        for each in whole
        for n, own in enumerate(_overrides(deployments[each.name]))
        if "identity" in own
    }
    for (name, _), message in key_files.mistakes(identities):
        mistakes.add(name, message)
    for name, message in [*_twins(whole, deployments), *_strangers(whole)]:
        mistakes.add(name, message)
    for name, message in mesh.mistakes(deployments, {entry.name: entry.data for entry in whole}):
        mistakes.add(name, message)
    if lines := mistakes.lines():
        raise SettingsError("\n".join(lines))
    return plans


def warnings(plans: Iterable[HostPlan]) -> list[str]:
    """Return a line for each setting that is allowed but will probably not work."""
    found = _Mistakes()
    for plan in plans:
        for message in tailnet.warnings(plan.deployment):
            found.add(plan.name, message)
    return found.lines()


def _is_whole(entry: HostEntry, mistakes: _Mistakes) -> bool:
    wrong = unusable(entry.data)
    for message in wrong:
        mistakes.add(entry.name, message)
    return not wrong


def unusable(data: Mapping[str, Any]) -> list[str]:
    """Return mistakes that make data unreadable for all other checks, without possible secrets."""
    return [
        *_unusable("", data),
        *(f"{key}: {EXPECTED_URL}" for key in secret_files.IN_URLS if _is_cut(data.get(key))),
    ]


def _unusable(place: str, value: Any) -> Iterator[str]:
    """Yield keys that are not text, and text that cannot be in a file or on a command line."""
    if isinstance(value, str):
        if "\0" in value or not _is_encodable(value):
            yield f"{place}: has a zero byte, or half a character; expected text"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            # Other keys than text are left to pydantic: the ports of tailscale_serve.
            if not isinstance(key, str) and (not place or place.startswith("slot ")):
                yield (
                    f"{f'{place}: ' if place else ''}{key!r}: not text; expected the name of a key"
                )
            else:
                yield from _unusable(f"{place}: {key}" if place else str(key), inner)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _unusable(f"slot {number}" if place == "slots" else place, inner)


def _is_cut(url: object) -> bool:
    """Return whether a value is a URL that cannot be parsed."""
    try:
        urlsplit(url if isinstance(url, str) else "")
    except ValueError:
        return True
    return False


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def clashes(slots: Collection[Slot], services: Mapping[str, Settings]) -> Iterator[str]:
    """Yield ports and announced addresses that two services of one host share."""
    ports = [
        (key, key, _value(services[role], key))
        for role in services
        for key in COORDINATOR_ROLES[role].ports
    ]
    ports += [
        (f"slot {slot.number}: swarm_port", f"slot {slot.number}", slot.settings.swarm.port)
        for slot in slots
    ]
    users: dict[object, str] = {}
    for place_of, user, port in ports:
        if port > MAX_PORT:
            yield f"{place_of}: got {port}, counted up from slot 0's; expected at most {MAX_PORT}"
        elif port and (other := users.setdefault(port, user)) != user:
            yield f"{place_of}: {port} is that of {other} too; give each its own, or 0"
    for slot in slots:
        user = f"slot {slot.number}"
        for address in slot.settings.swarm.announce:
            if (other := users.setdefault(address, user)) != user:
                yield (
                    f"{user}: swarm_announce: {address} is that of {other} too; give each its own"
                    " in a list of slots, or set swarm_announce_interface"
                )


def _twins(
    entries: Collection[HostEntry], deployments: Mapping[str, Deployment]
) -> Iterator[tuple[str, str]]:
    """Yield host and message for each value that two hosts share and that must be unique."""
    users: dict[tuple[str, object], str] = {}
    for entry in entries:
        of = deployments[entry.name]
        own: list[tuple[str, object]] = [("tailscale_hostname", of.tailscale_hostname)]
        if of.wireguard and of.wireguard_endpoint != mesh.NOBODY:
            own.append(
                (
                    "wireguard_endpoint",
                    of.wireguard_endpoint and f"{of.wireguard_endpoint}:{of.wireguard_port}",
                )
            )
        if not entry.name.startswith("@"):
            where = entry.data.get("ssh_hostname") or entry.name
            own.append(("ssh_hostname", f"{where}, port {entry.data.get('ssh_port') or 22},"))
        for key, value in own:
            if (
                value is not None
                and (other := users.setdefault((key, value), entry.name)) != entry.name
            ):
                yield (
                    entry.name,
                    f"{key}: {value} is that of {other} too; expected another for each host",
                )


def _strangers(entries: Collection[HostEntry]) -> Iterator[tuple[str, str]]:
    """Yield all hosts if their folders of secrets differ: they would have different tokens."""
    default = Deployment.model_fields["secrets_dir"].default
    # As the data say: a host whose others are wrong has no deployment to ask.
    folders = {str(entry.data.get("secrets_dir", default)) for entry in entries}
    if len(folders) > 1:
        said = ", ".join(map(repr, sorted(folders)))
        yield from (
            (entry.name, f"secrets_dir: got {said} on different hosts; expected one for all")
            for entry in entries
        )


def _deployment(entry: HostEntry, mistakes: _Mistakes) -> Deployment:
    if not {WORKERS, COORDINATORS} & set(entry.groups):
        mistakes.add(
            entry.name,
            f"in no group that gets anything; put the host into {WORKERS} or {COORDINATORS}",
        )
    for key in sorted(entry.data):
        if key in DERIVED:
            mistakes.add(entry.name, f"{key}: {SET_BY_DEPLOY}")
        elif not (key in entry.foreign_keys or key in Deployment.model_fields or _section(key)):
            known = [*Deployment.model_fields, *settings.flat_keys(), *entry.foreign_keys]
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "docs/configuration.md lists all keys"
            mistakes.add(entry.name, f"{key}: not a known key; {hint}")
    own = {key: value for key, value in entry.data.items() if key in Deployment.model_fields}
    try:
        deployment = Deployment(**own)
    except ValidationError as error:
        for message in _problems(error):
            mistakes.add(entry.name, message)
        has_wrong_slots = any(problem["loc"][0] == "slots" for problem in error.errors())
        return Deployment(slots=None if has_wrong_slots else own.get("slots"))
    for message in tailnet.mistakes(deployment):
        mistakes.add(entry.name, message)
    return deployment


def _problems(error: ValidationError) -> list[str]:
    return [
        f"{'/'.join(map(str, problem['loc']))}: {_message(problem)}" for problem in error.errors()
    ]


def _message(problem: ErrorDetails) -> str:
    if problem["type"] == WHOLE_MESSAGE:
        return problem["msg"]
    return f"got {problem['input']!r}; expected {_wanted(problem['msg'])}"


def _wanted(message: str) -> str:
    """Return what was expected, in pydantic's words or in shorter ones."""
    form = re.fullmatch(r"String should match pattern '(.*)'", message)
    return (
        settings.form(form[1])
        if form
        else settings.plainly(re.sub("^(Input should be|Value error,) ", "", message))
    )


def _value(of: Settings, key: str) -> Any:
    section, _, name = key.partition("_")
    return getattr(getattr(of, section), name)


def _section(key: str) -> str | None:
    """Return the section of the settings that a key belongs to; None: it is not a setting."""
    section, _, name = key.partition("_")
    return section if name and section in settings.SECTIONS else None


def _wrong_settings(entry: HostEntry) -> list[str]:
    """Return the mistakes in the host's settings, including those of roles it does not have."""
    own = {key: value for key, value in entry.data.items() if _section(key) and key not in DERIVED}
    return [*settings.flat_mistakes(own), *secret_files.mistakes(entry.data), *_wrong_values(own)]


def _wrong_values(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield model names that have the right type but cannot exist."""
    name = data.get("model_name")
    if isinstance(name, str) and _is_downloaded(name) and not _HUB_NAME.fullmatch(name):
        yield (
            f"model_name: got {name!r}, neither a folder nor a Hugging Face name (owner/model);"
            " expected such a name, a folder's whole path, hivewright/tiny or auto"
        )


def _slots(
    entry: HostEntry,
    deployment: Deployment,
    coordinators: Collection[HostEntry],
    wrong: Collection[str],
    mistakes: _Mistakes,
) -> tuple[Slot, ...]:
    """Return the slots of a host, without those that have mistakes.

    `wrong`: known mistakes of the host's own settings, which each slot would repeat.
    """
    if message := _wrong_number(entry, deployment):
        mistakes.add(entry.name, message)
        return ()
    if not (overrides := _overrides(deployment)):
        return ()
    account_url = _account_url(entry, coordinators, mistakes)
    slots = []
    for number, own in enumerate(overrides):
        flat = _slot_settings(entry, number, own, account_url)
        if not coordinators and _is_lonely(flat):
            mistakes.add(entry.name, NO_SWARM)
        slot, problems = _slot(entry, number, own, flat)
        for message in (*_misplaced(own), *problems):
            if message not in wrong:
                mistakes.add(entry.name, f"slot {number}: {message}")
        if slot is not None:
            slots.append(slot)
    return tuple(slots)


def _wrong_number(entry: HostEntry, deployment: Deployment) -> str | None:
    """Return the mistake in the host's number of slots, given its groups and device, or None."""
    count = entry.data.get("slots")
    if WORKERS not in entry.groups:
        if count is None:
            return None
        return f"slots: got {count!r}, but not in {WORKERS}; put the host there, or leave slots out"
    if count is None:
        return f"slots: none; expected {SLOTS_MAY_BE}, for a host in {WORKERS}"
    device = entry.data.get("model_device")
    if deployment.slots == AUTO and isinstance(device, str) and ":" in device:
        return (
            f"model_device: got {device!r}, and slots auto, which is a worker for each GPU;"
            " expected auto, cuda or cpu"
        )
    return None


def _overrides(deployment: Deployment) -> tuple[Mapping[str, Any], ...]:
    """Return the keys in which each slot of a host differs; for `auto`, those of the first slot."""
    slots = deployment.slots or ()
    return ({},) if isinstance(slots, str) else slots


def _slot(
    entry: HostEntry, number: int, own: Mapping[str, Any], flat: dict[str, Any]
) -> tuple[Slot | None, list[str]]:
    """Return a slot with the settings `flat`, or None, and its mistakes."""
    options, problems = _slot_options(entry, own)
    unknown = [key for key in own if key not in SLOT_KEYS and not _section(key)]
    flat = {key: value for key, value in flat.items() if key not in unknown}
    tokens = {key: own.get(key, entry.data.get(key)) for key in secret_files.TOKENS}
    problems += [*_unknown_slot_keys(unknown), *_wrong_values(own)]
    problems += [*settings.flat_mistakes(flat), *secret_files.mistakes(tokens)]
    if problems:
        return None, problems
    files = (own.get("identity"), tokens["hub_token_file"], tokens["model_token_file"])
    key, hub_token, model_token = (Path(str(file)) if file else None for file in files)
    slot = Slot(
        number,
        settings.from_flat(flat, ""),
        key,
        options,
        hub_token=hub_token,
        model_token=model_token,
    )
    return slot, []


def _misplaced(own: Mapping[str, Any]) -> Iterator[str]:
    """Yield keys of a slot that cannot be set for a slot."""
    for key in sorted(DERIVED & set(own)):
        yield f"{key}: {SET_BY_DEPLOY}"
    for key in sorted(own):
        if (section := _section(key)) and section not in WORKER_SECTIONS:
            yield f"{key}: no worker reads it; put it into the data of the {COORDINATORS} host"


def _unknown_slot_keys(unknown: Collection[str]) -> Iterator[str]:
    for key in unknown:
        close = difflib.get_close_matches(key, [*SLOT_KEYS, *settings.flat_keys()], n=1)
        hint = f"did you mean {close[0]}?" if close else "docs/configuration.md lists all keys"
        yield f"{key}: not a known key of a slot; {hint}"


def _slot_options(entry: HostEntry, own: Mapping[str, Any]) -> tuple[SlotOptions, list[str]]:
    """Return a slot's share of the machine and its mistakes; the host's own keys are defaults."""
    own_options = {key: value for key, value in own.items() if key in SlotOptions.model_fields}
    problems = []
    device = own.get("model_device", entry.data.get("model_device", "auto"))
    if own_options.get("gpu") is not None and device not in ("auto", "cuda"):
        problems.append(
            f"gpu: got {own_options['gpu']}, and model_device {device!r}; expected one of them"
        )
    try:
        SlotOptions(**own_options)
    except ValidationError as error:
        return SlotOptions(), [*problems, *_problems(error)]
    of_host = {key: entry.data[key] for key in SlotOptions.model_fields if key in entry.data}
    try:
        return SlotOptions(**of_host | own_options), problems
    except ValidationError:
        # The host's own, named as such by now.
        return SlotOptions(**own_options), problems


def _slot_settings(
    entry: HostEntry, number: int, own: Mapping[str, Any], account_url: str | None
) -> dict[str, Any]:
    flat = _own_settings(entry, WORKER_SECTIONS)
    if (port := _port(entry, number, own)) is not None:
        flat["swarm_port"] = port
    flat |= {key: value for key, value in own.items() if key not in SLOT_KEYS}
    flat.setdefault("node_name", _node_name(entry.name, number))
    flat.setdefault("chain_poll_seconds", WORKER_POLL_SECONDS)
    if account_url:
        flat.setdefault("chain_account_url", account_url)
    if "chain_account_url" in flat:
        flat["chain_enrolment_token_file"] = credential(f"enrol@{number}")
    if isinstance(flat.get("hub_token_file"), str):
        flat["hub_token_file"] = credential(f"worker@{number}", HUB_TOKEN)
    if isinstance(flat.get("model_token_file"), str):
        # The worker never has it: it is handed to `hivewright fetch`.
        del flat["model_token_file"]
    flat["node_state_dir"] = str(state_dir(number))
    if _is_downloaded(flat.get("model_name")):
        flat["model_shared_dir"] = str(MODELS)
    return flat


def _is_downloaded(model_name: object) -> bool:
    """Return whether a model of this name is downloaded from Hugging Face."""
    is_named = isinstance(model_name, str) and model_name != settings.Model().name
    return is_named and not str(model_name).startswith(("/", "./", "../", "~"))


def _port(entry: HostEntry, number: int, own: Mapping[str, Any]) -> int | None:
    """Return the slot's own port, or the host's plus its number; None: neither is set."""
    if "swarm_port" in own:
        port = own["swarm_port"]
        return port if isinstance(port, int) else None
    port = entry.data.get("swarm_port")
    return port + number if isinstance(port, int) and not isinstance(port, bool) and port else None


def _is_lonely(flat: Mapping[str, Any]) -> bool:
    """Return whether a worker with these settings should find others, but cannot."""
    ways = ("chain_account_url", "chain_rpc_url", "swarm_bootnodes")
    return flat.get("swarm_enabled", True) is True and not any(flat.get(way) for way in ways)


def _services(entry: HostEntry, deployment: Deployment) -> dict[str, Settings]:
    """Return the settings of the coordinator's roles, from data without mistakes."""
    if COORDINATORS not in entry.groups:
        return {}
    of_host: dict[str, dict[str, Any]] = {
        "chain": {"anvil_binary": str(entry.data.get("anvil_binary") or ANVIL)},
        "bootnode": dict(bootnode_announce(entry.data)),
        "account": {},
    }
    port = entry.data.get("account_port", settings.Account.model_fields["port"].default)
    served = {*deployment.tailscale_serve.values(), *deployment.tailscale_serve_http.values()}
    if deployment.tailscale and port in served:
        of_host["account"]["account_behind_proxy"] = entry.data.get("account_behind_proxy", True)
    services = {}
    for role, service in COORDINATOR_ROLES.items():
        # chain.account_url is for nodes without a way to the chain; these services are next to it.
        flat = _own_settings(entry, service.sections)
        flat.pop("chain_account_url", None)
        flat |= {key: str(path) for key, path in service.files.items()}
        services[role] = settings.from_flat(flat | of_host.get(role, {}), entry.name)
    return services


def _own_settings(entry: HostEntry, sections: Collection[str]) -> dict[str, Any]:
    """Return the keys of the host's data that belong to these sections of the settings."""
    return {
        key: value
        for key, value in entry.data.items()
        if _section(key) in sections and key not in DERIVED
    }


def _account_url(
    entry: HostEntry, coordinators: Collection[HostEntry], mistakes: _Mistakes
) -> str | None:
    """Return the URL of the inventory's own account service; None: the host uses another way."""
    if "chain_account_url" in entry.data or "chain_rpc_url" in entry.data or len(coordinators) != 1:
        return None
    coordinator = next(iter(coordinators))
    host = coordinator.data.get("account_host", settings.Account().host)
    port = coordinator.data.get("account_port", settings.Account().port)
    if entry.name != coordinator.name and not is_reachable(host):
        mistakes.add(
            coordinator.name,
            f"account_host: got {host!r}, which workers on other hosts cannot reach; use this"
            " host's LAN or VPN address",
        )
        return None
    return f"http://{f'[{host}]' if ':' in str(host) else host}:{port}"


def _node_name(host: str, number: int) -> str:
    return _nth_name(re.sub(r"[^A-Za-z0-9._-]+", "-", host).strip("-._")[:50] or "worker", number)


def _nth_name(name: str, number: int) -> str:
    """Append the number from the second slot on, so that a later slot does not rename the first."""
    return f"{name}-{number}" if number else name
