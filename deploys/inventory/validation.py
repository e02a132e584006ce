"""Validate an inventory: report every mistake of every host before any host is touched.

Host data are flat keys. Those that begin with a section of the settings (`trainer_learning_rate`)
become settings of the roles on that host; those of `Deployment` determine what is installed;
pyinfra's own (`ssh_user`, `_sudo`) are ignored; anything else is a mistake. Independent of pyinfra:
`planning.py` passes its inventory as plain dicts.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from deploys import mesh
from deploys.inventory import key_files, secret_files
from deploys.inventory.addresses import is_reachable
from deploys.inventory.derived_settings import (
    account_secrets,
    hint,
    section_of,
    service_settings,
    wrong_metrics_port,
)
from deploys.inventory.host_plan import COORDINATORS, WORKERS, HostEntry, HostPlan, clashes
from deploys.inventory.schema import AUTO, Deployment, is_too_large, pick, problems_of
from deploys.inventory.slot_checks import SET_BY_DEPLOY, make_slots, wrong_number, wrong_values
from deploys.inventory.slots import Slot, with_families
from deploys.services import DERIVED
from deploys.tailscale import tailnet
from worker import settings
from worker.errors import SettingsError

EXPECTED_URL = "not a URL; expected one such as https://git.example.org/hivewright.git"


class _Mistakes:
    """Collects messages; hosts with the same mistake share a line."""

    def __init__(self) -> None:
        self._hosts: dict[str, list[str]] = {}

    def add(
        self,
        host: str,
        *messages: str,
    ) -> None:
        for message in messages:
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
        message = f"{COORDINATORS}: {len(coordinators)} hosts in this group; expected one"
        for entry in coordinators:
            mistakes.add(entry.name, message)
    usable = []
    for entry in entries:
        messages = unusable(entry.data)
        mistakes.add(entry.name, *messages)
        if not messages:
            usable.append(entry)
    plans, deployments = {}, {}
    for entry in usable:
        deployment = _deployment(entry, mistakes)
        deployments[entry.name] = deployment
        plan = _plan(entry, deployment, coordinators, mistakes)
        if plan is not None:
            plans[entry.name] = plan
    _compare_hosts(usable, deployments, mistakes)
    if lines := mistakes.lines():
        raise SettingsError("\n".join(lines))
    all_slots: list[Slot] = []
    for plan in plans.values():
        all_slots += plan.slots
    return {
        name: replace(plan, services=with_families(plan.services, all_slots))
        for name, plan in plans.items()
    }


def warnings(plans: Iterable[HostPlan]) -> list[str]:
    """Return a line for each setting that is allowed but will probably not work."""
    found = _Mistakes()
    for plan in plans:
        found.add(plan.name, *tailnet.warnings(plan.deployment))
    return found.lines()


def unusable(data: Mapping[str, Any]) -> list[str]:
    """Return mistakes that make data unreadable for all other checks, without possible secrets."""
    cut = [key for key in secret_files.IN_URLS if _is_cut(data.get(key))]
    return [*_unusable("", data), *(f"{key}: {EXPECTED_URL}" for key in cut)]


def _unusable(
    place: str,
    value: Any,
) -> Iterator[str]:
    """Yield keys that are not text, and values that cannot be in a file or on a command line."""
    if is_too_large(value):
        yield f"{place}: a number of more than 300 digits; expected a smaller one"
    elif isinstance(value, str):
        if "\0" in value or not _is_encodable(value):
            yield f"{place}: has a zero byte, or half a character; expected text"
    elif isinstance(value, Mapping):
        prefix = f"{place}: " if place else ""
        # pydantic checks the keys of inner mappings, such as the ports of tailscale_serve.
        is_outer = not place or place.startswith("slot ")
        for key, inner in value.items():
            if is_outer and not isinstance(key, str):
                yield f"{prefix}{key!r}: not text; expected the name of a key"
            else:
                yield from _unusable(f"{prefix}{key}", inner)
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


def _deployment(entry: HostEntry, mistakes: _Mistakes) -> Deployment:
    if not {WORKERS, COORDINATORS} & set(entry.groups):
        mistakes.add(
            entry.name,
            f"in no group that gets anything; put the host into {WORKERS} or {COORDINATORS}",
        )
    mistakes.add(entry.name, *_wrong_keys(entry))
    own = pick(entry.data, Deployment.model_fields)
    try:
        deployment = Deployment(**own)
    except ValidationError as error:
        mistakes.add(entry.name, *problems_of(error))
        has_wrong_slots = any(problem["loc"][0] == "slots" for problem in error.errors())
        return Deployment(slots=None if has_wrong_slots else own.get("slots"))
    mistakes.add(entry.name, *tailnet.mistakes(deployment))
    return deployment


def _wrong_keys(entry: HostEntry) -> Iterator[str]:
    known = {*Deployment.model_fields, *entry.foreign_keys}
    for key in sorted(entry.data):
        if key in DERIVED:
            yield f"{key}: {SET_BY_DEPLOY}"
        elif key not in known and not section_of(key):
            yield f"{key}: not a known key; {hint(key, [*known, *settings.flat_keys()])}"


def _plan(
    entry: HostEntry,
    deployment: Deployment,
    coordinators: Collection[HostEntry],
    mistakes: _Mistakes,
) -> HostPlan | None:
    """Return the plan of a host; None if its own settings have mistakes."""
    wrong = _wrong_settings(entry)
    mistakes.add(entry.name, *wrong)
    slots: list[Slot] = []
    if message := wrong_number(entry, deployment):
        mistakes.add(entry.name, message)
    elif deployment.overrides:
        account_url = _account_url(entry, coordinators, mistakes)
        slots, messages = make_slots(
            entry, deployment, account_url, must_find_swarm=not coordinators
        )
        # Left out: each slot would repeat the mistakes of the host's own settings.
        repeated = {f"slot {n}: {text}" for n in range(len(deployment.overrides)) for text in wrong}
        mistakes.add(entry.name, *(text for text in messages if text not in repeated))
    if wrong:
        return None
    services = service_settings(entry, deployment)
    mistakes.add(entry.name, *clashes(slots, services))
    is_auto = bool(slots) and deployment.slots == AUTO
    secrets = account_secrets(entry)
    return HostPlan(entry.name, deployment, tuple(slots), services, is_auto, secrets)


def _wrong_settings(entry: HostEntry) -> list[str]:
    """Return the mistakes in the host's settings, including those of roles it does not have."""
    own = {
        key: value for key, value in entry.data.items() if key not in DERIVED and section_of(key)
    }
    return [
        *settings.flat_mistakes(own),
        *secret_files.mistakes(entry.data),
        *wrong_values(own),
        *wrong_metrics_port(entry),
    ]


def _account_url(
    entry: HostEntry, coordinators: Collection[HostEntry], mistakes: _Mistakes
) -> str | None:
    """Return the URL of the inventory's own account service; None: the host uses another way."""
    has_other_way = {"chain_account_url", "chain_rpc_url"} & entry.data.keys()
    if has_other_way or len(coordinators) != 1:
        return None
    (coordinator,) = coordinators
    default = settings.Account()
    host = coordinator.data.get("account_host", default.host)
    port = coordinator.data.get("account_port", default.port)
    if entry.name != coordinator.name and not is_reachable(host):
        mistakes.add(
            coordinator.name,
            f"account_host: got {host!r}, which workers on other hosts cannot reach; use this"
            " host's LAN or VPN address",
        )
        return None
    return f"http://{f'[{host}]' if ':' in str(host) else host}:{port}"


def _compare_hosts(
    entries: Collection[HostEntry],
    deployments: Mapping[str, Deployment],
    mistakes: _Mistakes,
) -> None:
    """Add the mistakes that only a comparison of hosts shows."""
    identities = {}
    for entry in entries:
        for number, own in enumerate(deployments[entry.name].overrides):
            if "identity" in own:
                identities[entry.name, number] = own["identity"]
    for (name, _), message in key_files.mistakes(identities):
        mistakes.add(name, message)
    data = {entry.name: entry.data for entry in entries}
    for name, message in (
        *_duplicates(entries, deployments),
        *_other_secrets(entries),
        *mesh.mistakes(deployments, data),
    ):
        mistakes.add(name, message)


def _duplicates(
    entries: Collection[HostEntry], deployments: Mapping[str, Deployment]
) -> Iterator[tuple[str, str]]:
    """Yield host and message for each value that two hosts share and that must be unique."""
    users: dict[tuple[str, str], str] = {}
    for entry in entries:
        for key, value in _unique_values(entry, deployments[entry.name]):
            other = users.setdefault((key, value), entry.name)
            if other != entry.name:
                message = f"{key}: {value} is that of {other} too; expected another for each host"
                yield entry.name, message


def _unique_values(
    entry: HostEntry,
    deployment: Deployment,
) -> Iterator[tuple[str, str]]:
    """Yield keys of a host whose values no other host may have."""
    if deployment.tailscale_hostname is not None:
        yield "tailscale_hostname", deployment.tailscale_hostname
    endpoint = deployment.wireguard_endpoint
    if deployment.wireguard and endpoint not in (None, mesh.NOBODY):
        yield "wireguard_endpoint", f"{endpoint}:{deployment.wireguard_port}"
    if not entry.name.startswith("@"):
        where = entry.data.get("ssh_hostname") or entry.name
        yield "ssh_hostname", f"{where}, port {entry.data.get('ssh_port') or 22},"


def _other_secrets(entries: Collection[HostEntry]) -> Iterator[tuple[str, str]]:
    """Yield all hosts if their folders of secrets differ: they would have different tokens."""
    default = Deployment.model_fields["secrets_dir"].default
    # From the data, because a host with other mistakes has no complete deployment.
    folders = {str(entry.data.get("secrets_dir", default)) for entry in entries}
    if len(folders) > 1:
        listed = ", ".join(map(repr, sorted(folders)))
        for entry in entries:
            yield entry.name, f"secrets_dir: got {listed} on different hosts; expected one for all"
