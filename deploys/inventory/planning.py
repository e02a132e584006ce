"""The plans of all hosts: made before pyinfra connects, and refined by each host's facts."""

import hashlib
import json
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from paramiko import SSHException
from pydantic import TypeAdapter
from pyinfra import host, inventory, state
from pyinfra.api.arguments import all_global_arguments
from pyinfra.api.exceptions import ConnectorDataTypeError, DeployError, PyinfraError
from pyinfra.api.host import Host
from pyinfra.api.util import raise_if_bad_type
from pyinfra.connectors.ssh import SSHConnector
from pyinfra.connectors.ssh_util import load_key_with_certificate
from pyinfra.context import ctx_host

from deploys import mesh, operator, paths
from deploys.facts import DamagedEnrolments, FileContent, Identities, MovedAway
from deploys.gpus import X86, Gpus, choose_torch
from deploys.hardware import Distribution, HostGpus, MissingParts, OwnPipSources
from deploys.inventory import secret_files, validation
from deploys.inventory.addresses import EXPECTED_SSH_HOST, is_ssh_host
from deploys.inventory.schema import PIP, Deployment
from deploys.inventory.slots import cards_in_use
from deploys.inventory.validation import HostEntry, HostPlan
from deploys.mesh import Member
from deploys.paths import STATE
from deploys.pyinfra_ext import fact_cache, run_report, sudo
from worker.errors import SettingsError
from worker.runtime.files import write_whole

CHECKOUT = Path(__file__).parents[2]
MAX_PORT = 65535
HURRIED_SECONDS = 5
NO_ANVIL = (
    "the chain's program (contracts/package-lock.json) is for x86_64, and this host is {machine}:"
    " make another host the coordinator, or put anvil for it on the host and name it, anvil_binary:"
    " /usr/local/bin/anvil"
)
DAMAGED = (
    "{files}: damaged; expected the JSON that enrolment wrote: restore it (`hivewright fleet"
    " restore`), or remove it, and the next deploy enrols the slot again, with the key that is next"
    " to it"
)

MOVED = (
    "the key of slot {numbers} was set aside by a move (swarm.pem.moved in {state}/worker-N). If"
    " the move is to stay, take the slot out of the inventory and deploy; put in again after that,"
    " it is a new worker. If it is to be undone, `hivewright fleet take-back INVENTORY --limit"
    " {name}` gives the key back"
)

UNLIKE_OURS = (
    "{names}: another enrolment token than this side ({file}); fetch theirs: `hivewright fleet"
    " fetch-token INVENTORY`, and if it is to be another one: `hivewright fleet rotate-token"
    " INVENTORY`, after that"
)
NOT_HERE = (
    "{file}: no such file, and the coordinator {name}, which may have the fleet's enrolment token,"
    " is not among the hosts that were reached; fetch it (`hivewright fleet fetch-token"
    " INVENTORY`), or deploy the coordinator first"
)


@dataclass(frozen=True, slots=True)
class Planned:
    """A host's plan with the commit it gets and the fleet's enrolment token (None: it has none).

    `mesh`: the members of the fleet's WireGuard mesh, by host; this host need not be one.
    `torch_index`: the package index of the build of torch that fits the host; None: as pip is
    configured on the host or, for a wheelhouse, here. `unfit`: why the host's facts contradict the
    plan; None: they do not.
    """

    host: HostPlan
    repository: str
    commit: str
    token: str | None = field(repr=False)
    mesh: Mapping[str, Member] = field(default_factory=dict)
    torch_index: str | None = None
    unfit: str | None = None


# In a folder of plans: names of the hosts that carry the swarm.
_COORDINATORS_FILE = "coordinators.json"
_AS_JSON = TypeAdapter(Planned)

_planned: dict[str, Planned] = {}
_coordinators: list[str] = []
# The token that this run makes, by the folder of secrets that it goes to, until it is there.
_token_to_keep: dict[Path, str] = {}

# pyinfra runs deploy.py once per host, all at the same time; the first one looks at the hosts for
# all.
_lock = threading.Lock()
_looked_for_twins = False


def make(all_hosts: Iterable[Host], is_dry: bool = False) -> None:
    """Make the plans of all hosts. Raises SettingsError, with a line for each mistake of any host.

    `is_dry`: do not make an enrolment token on this side either.
    """
    all_hosts = list(all_hosts)
    entries = [_entry(each) for each in all_hosts]
    whole = [entry for entry in entries if not validation.unusable(entry.data)]
    lines = [line for each in all_hosts for line in _wrong_access(each)]
    plans: dict[str, HostPlan] = {}
    commits: dict[str, tuple[str, str]] = {}
    try:
        plans = validation.check(entries)
    except SettingsError as error:
        lines += str(error).splitlines()
    try:
        # What is wrong already is not to wait for a repository that can't be reached.
        commits = _commits(whole, HURRIED_SECONDS if lines else operator.RESOLVE_SECONDS)
    except SettingsError as error:
        lines += str(error).splitlines()
    lines += [*_wrong_secrets(whole), *_shown_passwords(plans)]
    if lines:
        raise SettingsError("\n".join(lines))
    data = {entry.name: entry.data for entry in entries}
    members = mesh.members({name: plan.deployment for name, plan in plans.items()}, data)
    _coordinators[:] = [name for name, plan in plans.items() if plan.services]
    _planned.update(
        {name: Planned(plan, *commits[name], None, members) for name, plan in plans.items()}
    )
    _give_token(is_dry)


def _give_token(is_dry: bool) -> None:
    """Put the fleet's enrolment token into all plans; make one if it is needed and missing."""
    if not _planned:
        return
    folder = CHECKOUT / next(iter(_planned.values())).host.deployment.secrets_dir
    token = operator.enrolment_token(folder)
    # It is written once no host is found to have another one.
    _token_to_keep.clear()
    if token is None and _coordinators:
        token = operator.new_token()
        if not is_dry:
            _token_to_keep[folder] = token
    _planned.update({name: replace(planned, token=token) for name, planned in _planned.items()})


def hand_on(folder: Path) -> None:
    """Write the plans, without secrets, into a folder for runs that deploy some of these hosts."""
    write_whole(folder / _COORDINATORS_FILE, json.dumps(_coordinators), durable=False)
    for name, planned in _planned.items():
        write_whole(
            folder / _file_of(name), _AS_JSON.dump_json(replace(planned, token=None)), durable=False
        )


def take_over(folder: Path, hosts: Iterable[Host], is_dry: bool = False) -> None:
    """Read the plans of these hosts from a run that has checked the whole inventory.

    The commit is that of `release_ref`, if that is a whole commit. Raises SettingsError if the
    hosts cannot be connected to with their data.
    """
    hosts = list(hosts)
    lines = [line for each in hosts for line in _wrong_access(each)]
    unknown = [each.name for each in hosts if not (folder / _file_of(each.name)).exists()]
    lines += [f"{name}: was not in the inventory when this began" for name in unknown]
    if lines:
        raise SettingsError("\n".join(lines))
    _coordinators[:] = json.loads((folder / _COORDINATORS_FILE).read_text())
    for each in hosts:
        planned = _AS_JSON.validate_json((folder / _file_of(each.name)).read_bytes())
        ref = str(each.data.dict().get("release_ref"))
        _planned[each.name] = (
            replace(planned, commit=ref) if operator.is_whole_commit(ref) else planned
        )
    _give_token(is_dry)


def _file_of(name: str) -> str:
    return f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def warnings() -> list[str]:
    """Return a line for each setting that is allowed but will probably not work."""
    return validation.warnings(planned.host for planned in _planned.values())


def current() -> Planned:
    """Return the plan of the current host. Raises DeployError if the hosts cannot be deployed."""
    global _looked_for_twins
    with _lock:
        if not _looked_for_twins:
            _looked_for_twins = True
            _refuse_twins()
            _settle_token()
    if host.name not in _planned:
        raise DeployError(
            "no plan was made; run deploy.py from the checkout, with the config.py that is there"
        )
    return _fit(_planned[host.name])


def _fit(planned: Planned) -> Planned:
    """Refine the plan of the current host by its facts: slots, their GPUs, and torch's build."""
    deployment, machine = planned.host.deployment, host.get_fact(Distribution).machine
    if missing := host.get_fact(MissingParts):
        return replace(planned, unfit=f"{host.name}: {missing}")
    if planned.host.needs_anvil and machine != X86:
        return replace(planned, unfit=NO_ANVIL.format(machine=machine))
    if damaged := host.get_fact(DamagedEnrolments):
        return replace(planned, unfit=DAMAGED.format(files=", ".join(damaged)))
    if moved := _moved_away(planned.host):
        numbers = ", ".join(map(str, moved))
        return replace(
            planned, unfit=MOVED.format(numbers=numbers, state=STATE, name=planned.host.name)
        )
    gpus = host.get_fact(HostGpus) if planned.host.slots else Gpus()
    try:
        plan = planned.host.on(gpus)
        if gpus.warning:
            rest = "the other GPUs are used" if gpus.cards else "its slots train on the CPU"
            run_report.note(f"{host.name}: {gpus.warning}; {rest}")
        if deployment.torch_index == PIP or (
            deployment.torch_index is None and _has_own_sources(deployment)
        ):
            return replace(planned, host=plan)
        used = replace(gpus, cards=cards_in_use(plan.slots, gpus))
        return replace(
            planned, host=plan, torch_index=choose_torch(used, deployment.torch_index, machine)
        )
    except SettingsError as error:
        return replace(planned, unfit=str(error))


def _moved_away(plan: HostPlan) -> list[int]:
    """Return planned slots whose key has moved to another host and that have no key file."""
    has_key = {slot.number for slot in plan.slots if slot.identity is not None}
    is_planned = {slot.number for slot in plan.slots}
    return [
        n
        for n in sorted(host.get_fact(MovedAway))
        if n not in has_key and (n in is_planned or plan.has_auto_slots)
    ]


def _has_own_sources(deployment: Deployment) -> bool:
    """Return whether packages come from pip on the host, and pip there has its own sources."""
    return deployment.release_source == "repository" and bool(host.get_fact(OwnPipSources))


def review(all_hosts: Iterable[Host]) -> list[str]:
    """Return what a deploy would refuse of the hosts' data, for commands that work without one.

    Raises SettingsError if pyinfra itself would end there, for all hosts.
    """
    all_hosts = list(all_hosts)
    if lines := [line for each in all_hosts for line in _of(each, _wrong_types(each).values())]:
        raise SettingsError("\n".join(lines))
    lines = [line for each in all_hosts for line in _wrong_access(each)]
    try:
        validation.check([_entry(each) for each in all_hosts])
    except SettingsError as error:
        lines += str(error).splitlines()
    return lines


def _of(each: Host, messages: Iterable[str]) -> Iterator[str]:
    return (f"inventory data of {each.name}: {message}" for message in messages)


def _wrong_access(of: Host) -> Iterator[str]:
    """Yield mistakes in ssh_port and the like, at which pyinfra ends the run and names no host."""
    wrong = _wrong_types(of)
    yield from _of(of, wrong.values())
    yield from _of(of, sudo.mistakes(of.data.dict()))
    if of.connector_cls is SSHConnector:
        right = {key: value for key, value in of.data.dict().items() if key not in wrong}
        yield from _of(of, _wrong_ssh(of.name, right))


def _wrong_types(of: Host) -> dict[str, str]:
    """Return messages about values of the wrong type, by key, without values of passwords."""
    data, kinds = (
        of.data.dict(),
        _plain_global_arguments() | get_type_hints(of.connector_cls.data_cls),
    )
    wrong = {}
    for key in sorted(data.keys() & kinds.keys()):
        try:
            raise_if_bad_type(data[key], kinds[key], ConnectorDataTypeError, key)
        except ConnectorDataTypeError:
            value = (
                type(data[key]).__name__
                if "password" in key or "kwargs" in key
                else repr(data[key])
            )
            wrong[key] = f"{key}: got {value}; expected {kinds[key].__name__}"
    return wrong


def _plain_global_arguments() -> dict[str, Any]:
    """Return pyinfra's own keys such as _sudo that have a plain type, which it does not check."""
    return {name: kind for name, kind in all_global_arguments() if kind in (bool, str, int)}


def _wrong_ssh(name: str, data: Mapping[str, Any]) -> Iterator[str]:
    """Yield values at which pyinfra or paramiko raises an exception that does not name the host."""
    where = data.get("ssh_hostname", name)
    if where is not None and not is_ssh_host(where):
        yield f"ssh_hostname: got {where!r}; {EXPECTED_SSH_HOST}"
    port = data.get("ssh_port")
    if port is not None and not 1 <= port <= MAX_PORT:
        yield f"ssh_port: got {port}; expected a port from 1 to {MAX_PORT}"
    if (key := data.get("ssh_key")) and (
        reason := _wrong_key(key, data.get("ssh_key_password") or "")
    ):
        yield f"ssh_key: {reason}; expected the file of a private key"


@cache
def _wrong_key(file: str, password: str) -> str | None:
    """Return why pyinfra cannot use a file as a key; None: it can."""
    try:
        load_key_with_certificate(file, password, cwd=str(Path.cwd()), allow_prompt=False)
    except PyinfraError as error:
        # Somebody can be asked for its passphrase.
        return None if "is encrypted" in str(error) and sys.stdin.isatty() else str(error)
    except (SSHException, OSError, ValueError):
        return f"Invalid private key file: {file}"
    return None


def _wrong_secrets(entries: Collection[HostEntry]) -> Iterator[str]:
    """Yield mistakes in the folders of secrets; creates nothing."""
    users: dict[str, list[str]] = {}
    for entry in entries:
        folder = entry.data.get("secrets_dir", Deployment.model_fields["secrets_dir"].default)
        if isinstance(folder, str) and folder:
            users.setdefault(folder, []).append(entry.name)
    for folder, names in users.items():
        for message in operator.secrets_mistakes(CHECKOUT / folder):
            yield f"inventory data of {', '.join(names)}: secrets_dir: {message}"


def _commits(entries: Collection[HostEntry], seconds: int) -> dict[str, tuple[str, str]]:
    """Return Git URL and commit by host. Raises SettingsError, with a line for each mistake."""
    users: dict[tuple[str | None, str], list[str]] = {}
    for entry in entries:
        repository = entry.data.get("release_repository")
        ref = entry.data.get("release_ref", Deployment.model_fields["release_ref"].default)
        # `validation.check` has named what is of another type, or not to be shown.
        if (
            isinstance(repository, str | None)
            and isinstance(ref, str)
            and not secret_files.shows_password(repository)
        ):
            users.setdefault((repository, ref), []).append(entry.name)
    commits, lines = {}, []
    for (repository, ref), names in users.items():
        source = f"inventory data of {', '.join(names)}"
        try:
            url = repository or _origin(source)
            commit = operator.resolve(url, ref, source, seconds)
        except SettingsError as error:
            lines.append(str(error))
            continue
        commits.update(dict.fromkeys(names, (url, commit)))
    if lines:
        raise SettingsError("\n".join(lines))
    return commits


def _origin(source: str) -> str:
    url = operator.origin(CHECKOUT, source)
    if secret_files.shows_password(url):
        instead = secret_files.IN_URLS["release_repository"]
        raise SettingsError(
            f"{source}: release_repository: not set, and origin of {CHECKOUT} {secret_files.SHOWN};"
            f" {instead}"
        )
    return url


def _shown_passwords(plans: Mapping[str, HostPlan]) -> Iterator[str]:
    """Yield passwords in account service URLs of slots; `validation.check` checks the hosts'."""
    for name, plan in plans.items():
        for slot in plan.slots:
            if secret_files.shows_password(slot.settings.chain.account_url):
                instead = secret_files.IN_URLS["chain_account_url"]
                place = f"inventory data of {name}: slot {slot.number}"
                yield f"{place}: chain_account_url: {secret_files.SHOWN}; {instead}"


def _refuse_twins() -> None:
    """Raise DeployError if two existing workers have one identity: a copied disk or key."""
    found = state.fact_pool.map(_identities, inventory.get_active_hosts())
    users: dict[str, str] = {}
    for name, identities in found:
        for number, peer_id in identities.items():
            user = f"slot {number} of {name}"
            if peer_id in users:
                raise run_report.stop(
                    f"{user} and {users[peer_id]} have one identity, {peer_id}; two workers can't"
                    " be one node: stop one, and remove swarm.pem and enrolment.json from its"
                    f" state folder, {STATE}/worker-N"
                )
            users[peer_id] = user


def _settle_token() -> None:
    """Write a new token to the folder of secrets. Raises DeployError if a host has another one."""
    planned = next(iter(_planned.values()), None)
    if planned is None or planned.token is None:
        return
    folder = CHECKOUT / planned.host.deployment.secrets_dir
    file = folder / operator.TOKEN_FILE
    active = list(inventory.get_active_hosts())
    found = dict(state.fact_pool.map(_token_of, active))
    known = {operator.fingerprint(planned.token), *operator.replaced_tokens(folder)}
    if others := [
        name for name, digest in found.items() if digest is not None and digest not in known
    ]:
        raise run_report.stop(UNLIKE_OURS.format(names=", ".join(others), file=file))
    for folder, token in _token_to_keep.items():
        if not set(_coordinators) & set(found):
            raise run_report.stop(NOT_HERE.format(file=file, name=", ".join(_coordinators)))
        operator.keep_token(folder, token)
    _token_to_keep.clear()


def _token_of(of: Host) -> tuple[str, str | None]:
    """Return a host's name and the fingerprint of its enrolment token."""
    with ctx_host.use(of):
        found = of.get_fact(FileContent, path=str(paths.ENROLMENT_TOKEN))
        return of.name, None if found is None else found.sha256


def _identities(of: Host) -> tuple[str, dict[int, str]]:
    with ctx_host.use(of):
        facts = (MissingParts, Identities, MovedAway, Distribution, HostGpus, OwnPipSources)
        token = (FileContent, {"path": str(paths.ENROLMENT_TOKEN)})
        fact_cache.ask_ahead(of, [*((fact, {}) for fact in facts), token])
        return of.name, of.get_fact(Identities)


def _entry(of: Host) -> HostEntry:
    # ssh_user and the like may be in `all` for the sake of other hosts, so every host may have
    # them, also @local.
    own = {name for name, _ in all_global_arguments()} | {
        *of.connector_cls.data_meta,
        *SSHConnector.data_meta,
    }
    own.add(sudo.PASSWORD_FILE)
    return HostEntry(of.name, tuple(of.groups), of.data.dict(), frozenset(own))
