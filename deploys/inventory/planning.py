"""The plans of all hosts: made before pyinfra connects, and refined by each host's facts."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter
from pyinfra import host, inventory, state
from pyinfra.api.arguments import all_global_arguments
from pyinfra.api.exceptions import DeployError
from pyinfra.api.host import Host
from pyinfra.connectors.ssh import SSHConnector
from pyinfra.context import ctx_host

from deploys import mesh, operator, paths
from deploys.facts import FileContent, Identities, MovedAway
from deploys.gpus import Gpus
from deploys.hardware import Distribution, HostGpus, MissingParts, OwnPipSources
from deploys.inventory import commits, fitting, scrape_targets, secret_files, validation
from deploys.inventory.access_checks import access_mistakes, located, wrong_types
from deploys.inventory.commits import CHECKOUT
from deploys.inventory.host_plan import HostEntry, HostPlan, Planned, Target
from deploys.inventory.schema import Deployment
from deploys.paths import STATE
from deploys.pyinfra_ext import fact_cache, run_report, sudo
from worker.errors import SettingsError
from worker.runtime.files import write_whole

# Time limit for looking up commits if the inventory has other mistakes, whose report should not
# wait for an unreachable repository.
HURRIED_SECONDS = 5
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
# In a folder of plans: names of the coordinators.
_COORDINATORS_FILE = "coordinators.json"
_AS_JSON = TypeAdapter(Planned)

_planned: dict[str, Planned] = {}
_coordinators: list[str] = []
# A token that this run has made, by its folder of secrets, until it is written there.
_token_to_keep: dict[Path, str] = {}

# Endpoints for Prometheus of this run's hosts.
_targets: dict[str, tuple[Target, ...]] = {}

# pyinfra runs deploy.py once per host, all at the same time; the first run compares all hosts.
_lock = threading.Lock()
_has_compared = False


def make(
    all_hosts: Iterable[Host],
    is_dry: bool = False,
) -> None:
    """Make the plans of all hosts. Raises SettingsError, with a line for each mistake of any host.

    `is_dry`: do not make an enrolment token on this side either.
    """
    all_hosts = list(all_hosts)
    entries = [_entry(each) for each in all_hosts]
    usable = [entry for entry in entries if not validation.unusable(entry.data)]
    lines = _access_mistakes(all_hosts)
    plans: dict[str, HostPlan] = {}
    found: dict[str, tuple[str, str]] = {}
    try:
        plans = validation.check(entries)
    except SettingsError as error:
        lines += str(error).splitlines()
    try:
        seconds = HURRIED_SECONDS if lines else operator.RESOLVE_SECONDS
        found = commits.look_up(usable, seconds)
    except SettingsError as error:
        lines += str(error).splitlines()
    lines += [*_wrong_secrets(usable), *_shown_passwords(plans)]
    if lines:
        raise SettingsError("\n".join(lines))
    data = {entry.name: entry.data for entry in entries}
    deployments = {name: plan.deployment for name, plan in plans.items()}
    members = mesh.members(deployments, data)
    targets: list[Target] = []
    for name, plan in plans.items():
        targets += scrape_targets.targets_of(plan, data[name])
    _coordinators[:] = [name for name, plan in plans.items() if plan.services]
    for name, plan in plans.items():
        repository, commit = found[name]
        _planned[name] = Planned(
            plan, repository, commit, token=None, mesh=members, targets=tuple(targets)
        )
    _give_token(is_dry)


def _access_mistakes(hosts: Iterable[Host]) -> list[str]:
    lines: list[str] = []
    for each in hosts:
        lines += access_mistakes(each)
    return lines


def _give_token(is_dry: bool) -> None:
    """Put the fleet's enrolment token into all plans; make one if it is needed and missing."""
    if not _planned:
        return
    folder = CHECKOUT / next(iter(_planned.values())).host.deployment.secrets_dir
    token = operator.enrolment_token(folder)
    # A new token is written only after the hosts have shown that none of them has another one.
    _token_to_keep.clear()
    if token is None and _coordinators:
        token = operator.new_token()
        if not is_dry:
            _token_to_keep[folder] = token
    for name, planned in _planned.items():
        _planned[name] = replace(planned, token=token)


def hand_on(folder: Path) -> None:
    """Write the plans, without secrets, into a folder for runs that deploy some of these hosts."""
    write_whole(folder / _COORDINATORS_FILE, json.dumps(_coordinators), durable=False)
    for name, planned in _planned.items():
        text = _AS_JSON.dump_json(replace(planned, token=None))
        write_whole(folder / _file_of(name), text, durable=False)


def take_over(
    folder: Path,
    hosts: Iterable[Host],
    is_dry: bool = False,
) -> None:
    """Read the plans of these hosts from a run that has checked the whole inventory.

    The commit is that of `release_ref`, if that is a whole commit. Raises SettingsError if the
    hosts cannot be connected to with their data.
    """
    hosts = list(hosts)
    lines = _access_mistakes(hosts)
    unknown = [each.name for each in hosts if not (folder / _file_of(each.name)).exists()]
    lines += [f"{name}: was not in the inventory when this began" for name in unknown]
    if lines:
        raise SettingsError("\n".join(lines))
    _coordinators[:] = json.loads((folder / _COORDINATORS_FILE).read_text())
    for each in hosts:
        planned = _AS_JSON.validate_json((folder / _file_of(each.name)).read_bytes())
        ref = str(each.data.dict().get("release_ref"))
        commit = ref if operator.is_whole_commit(ref) else planned.commit
        _planned[each.name] = replace(planned, commit=commit)
    _give_token(is_dry)


def _file_of(name: str) -> str:
    return f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def warnings() -> list[str]:
    """Return a line for each setting that is allowed but will probably not work."""
    return validation.warnings(planned.host for planned in _planned.values())


def current() -> Planned:
    """Return the plan of the current host. Raises DeployError if the hosts cannot be deployed."""
    global _has_compared
    with _lock:
        if not _has_compared:
            _has_compared = True
            _refuse_duplicates()
            _settle_token()
            _count_targets()
    if host.name not in _planned:
        raise DeployError(
            "no plan was made; run deploy.py from the checkout, with the config.py that is there"
        )
    fitted = fitting.fit(_planned[host.name])
    return replace(fitted, targets=tuple(scrape_targets.merged(fitted.targets, _targets)))


def _count_targets() -> None:
    """Add the endpoints of this run's hosts; their facts show the number of their auto slots."""
    _targets.update(state.fact_pool.map(_targets_of, list(inventory.get_active_hosts())))


def _targets_of(of: Host) -> tuple[str, tuple[Target, ...]]:
    plan = _planned[of.name].host
    with ctx_host.use(of), contextlib.suppress(SettingsError):  # `fit` reports it
        plan = plan.on(of.get_fact(HostGpus) if plan.slots else Gpus())
    return of.name, scrape_targets.targets_of(plan, of.data.dict())


def review(all_hosts: Iterable[Host]) -> list[str]:
    """Return the mistakes in the hosts' data that only a deploy refuses, for other commands.

    Raises SettingsError for mistakes with which pyinfra itself would end its run of all hosts.
    """
    all_hosts = list(all_hosts)
    fatal: list[str] = []
    for each in all_hosts:
        fatal += [located(each, message) for message in wrong_types(each).values()]
    if fatal:
        raise SettingsError("\n".join(fatal))
    lines = _access_mistakes(all_hosts)
    try:
        validation.check([_entry(each) for each in all_hosts])
    except SettingsError as error:
        lines += str(error).splitlines()
    return lines


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


def _shown_passwords(plans: Mapping[str, HostPlan]) -> Iterator[str]:
    """Yield passwords in account service URLs of slots; `validation.check` checks the hosts'."""
    for name, plan in plans.items():
        for slot in plan.slots:
            if secret_files.shows_password(slot.settings.chain.account_url):
                instead = secret_files.IN_URLS["chain_account_url"]
                place = f"inventory data of {name}: slot {slot.number}"
                yield f"{place}: chain_account_url: {secret_files.SHOWN}; {instead}"


def _refuse_duplicates() -> None:
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
    found = dict(state.fact_pool.map(_token_of, list(inventory.get_active_hosts())))
    # None: a host without a token.
    known = {None, operator.fingerprint(planned.token)}
    known |= operator.replaced_tokens(folder)
    others = [name for name, digest in found.items() if digest not in known]
    if others:
        raise run_report.stop(UNLIKE_OURS.format(names=", ".join(others), file=file))
    for folder, token in _token_to_keep.items():
        if not set(_coordinators) & set(found):
            raise run_report.stop(NOT_HERE.format(file=file, name=", ".join(_coordinators)))
        operator.keep_token(folder, token)
    _token_to_keep.clear()


def _token_of(target: Host) -> tuple[str, str | None]:
    """Return a host's name and the fingerprint of its enrolment token, None without one."""
    with ctx_host.use(target):
        found = target.get_fact(FileContent, path=str(paths.ENROLMENT_TOKEN))
    return target.name, None if found is None else found.sha256


def _identities(target: Host) -> tuple[str, dict[int, str]]:
    with ctx_host.use(target):
        facts = (MissingParts, Identities, MovedAway, Distribution, HostGpus, OwnPipSources)
        questions: list[fact_cache.Question] = [(fact, {}) for fact in facts]
        questions.append((FileContent, {"path": str(paths.ENROLMENT_TOKEN)}))
        fact_cache.ask_ahead(target, questions)
        return target.name, target.get_fact(Identities)


def _entry(target: Host) -> HostEntry:
    # ssh_user and the like may be in `all` because of other hosts, so every host may have them,
    # even @local.
    own = {sudo.PASSWORD_FILE, *target.connector_cls.data_meta, *SSHConnector.data_meta}
    own.update(name for name, _ in all_global_arguments())
    return HostEntry(target.name, tuple(target.groups), target.data.dict(), frozenset(own))
