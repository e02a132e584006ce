"""The plan of the host that is being deployed, from pyinfra's inventory. The whole inventory is checked first, once."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

from pyinfra import host, inventory, state
from pyinfra.api.arguments import all_global_arguments
from pyinfra.api.exceptions import DeployError
from pyinfra.api.host import Host
from pyinfra.context import ctx_host

from deploys import connection, hosts, operator
from deploys.facts import Identities
from deploys.hosts import STATE, HostEntry, HostPlan
from worker.errors import SettingsError

CHECKOUT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Planned:
    """A host's plan, the commit that it gets, and the fleet's enrolment token (None: it has none)."""

    host: HostPlan
    repository: str
    commit: str
    token: str | None = field(repr=False)


# pyinfra runs deploy.py once per host, all at the same time; the first one does the work for all.
_lock = threading.Lock()
_planned: dict[str, Planned] = {}


def current() -> Planned:
    """The plan of the current host. Raises DeployError with everything that is wrong with any host's data."""
    connection.limit_silence(host)
    with _lock:
        if not _planned:
            plans = _plan_all()
            _refuse_twins()
            _planned.update(plans)
    return _planned[host.name]


def _plan_all() -> dict[str, Planned]:
    try:
        plans = hosts.check([_entry(each) for each in inventory])
        commits: dict[tuple[str, str], str] = {}
        has_account = any(plan.services for plan in plans.values())
        return {name: _resolve(plan, commits, has_account) for name, plan in plans.items()}
    except SettingsError as error:
        raise DeployError(str(error)) from None


def _refuse_twins() -> None:
    """Raise DeployError if two workers that exist already are one node: a copied disk, or a copied key."""
    found = state.fact_pool.map(_identities, inventory.get_active_hosts())
    users: dict[str, str] = {}
    for name, identities in found:
        for number, peer_id in identities.items():
            user = f"slot {number} of {name}"
            if peer_id in users:
                raise DeployError(
                    f"{user} and {users[peer_id]} have one identity, {peer_id}; two workers can't be one node: stop "
                    f"one, and remove swarm.pem and enrolment.json from its state folder, {STATE}/worker-N"
                )
            users[peer_id] = user


def _identities(of: Host) -> tuple[str, dict[int, str]]:
    with ctx_host.use(of):
        return of.name, of.get_fact(Identities)


def _entry(of: Host) -> HostEntry:
    own = {name for name, _ in all_global_arguments()} | set(of.connector_cls.data_meta)
    return HostEntry(of.name, tuple(of.groups), of.data.dict(), frozenset(own))


def _resolve(plan: HostPlan, commits: dict[tuple[str, str], str], has_account: bool) -> Planned:
    """`commits` remembers what was asked for another host already."""
    source = f"inventory data of {plan.name}"
    url = plan.deployment.release_repository or operator.origin(CHECKOUT, source)
    key = (url, plan.deployment.release_ref)
    if key not in commits:
        commits[key] = operator.resolve(*key, source)
    token = operator.enrolment_token(CHECKOUT / plan.deployment.secrets_dir, create=has_account)
    return Planned(plan, url, commits[key], token)
