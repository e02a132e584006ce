"""Refuse a rollout that would change the WireGuard mesh: such a change must reach all hosts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deploys import mesh, operator
from deploys.fleet import queries
from deploys.fleet.pyinfra_process import CHECKOUT, Pyinfra
from deploys.inventory.schema import Deployment
from worker.errors import SettingsError

FACTS = ("deploys.fleet_facts.MeshParts", "deploys.fleet_facts.HostStates")


def require_settled(
    pyinfra: Pyinfra,
    hosts: Sequence[Mapping[str, Any]],
) -> None:
    """Raise SettingsError if a deploy would change the mesh configuration of any host.

    `hosts`: all hosts, already checked. New public keys are recorded here. Hosts that do not answer
    count as unchanged.
    """
    data = {host["name"]: host["data"] for host in hosts}
    deployments = {name: _wireguard(own) for name, own in data.items()}
    members = mesh.members(deployments, data)
    if not members:
        return
    parts, states = queries.ask(pyinfra, FACTS, list(members), queries.FACT_SECONDS).values
    folder = CHECKOUT / next(iter(data.values())).get(
        "secrets_dir", Deployment.model_fields["secrets_dir"].default
    )
    found = {name: part["public_key"] for name, part in parts.items() if part["public_key"]}
    keys = operator.remember_public_keys(folder, found)
    others = list(_unsettled(members, parts, keys))
    if others:
        commits = {state["commit"] for state in states.values() if state["commit"]}
        pinned = f"--data release_ref={commits.pop()} " if len(commits) == 1 else ""
        raise SettingsError(
            f"WireGuard: {', '.join(others)}: connected otherwise than the inventory says, which a"
            " rollout does not change: it goes from host to host, and this must reach all; deploy"
            " them first, with the release that they have: .venv/bin/pyinfra -y"
            f" {pinned}{pyinfra.inventory} deploy.py"
        )


def _wireguard(data: Mapping[str, Any]) -> Deployment:
    return Deployment(**{key: value for key, value in data.items() if key.startswith("wireguard")})


def _unsettled(
    members: Mapping[str, mesh.Member],
    parts: Mapping[str, Mapping[str, Any]],
    keys: Mapping[str, str],
) -> Iterator[str]:
    for name, part in parts.items():
        text = mesh.configuration(members[name], members.values(), {**part["peers"], **keys})
        if not part["runs"] or part["digest"] != mesh.digest(text):
            yield name
