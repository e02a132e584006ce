"""A WireGuard mesh: its members, their addresses, and their configurations. Independent of pyinfra.

A host's address is derived from its name, so other hosts may come and go without changing it.
Without a hub every host is a peer of every other; with hubs each other host has one hub as its only
peer, and hubs forward traffic.
"""

import hashlib
import ipaddress
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from operator import attrgetter
from pathlib import Path
from typing import Any

from deploys.inventory.addresses import is_address, is_reachable
from deploys.inventory.schema import Deployment
from worker.settings import is_host

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

INTERFACE = "wg-hivewright"
UNIT = f"wg-quick@{INTERFACE}.service"
FOLDER = Path("/etc/wireguard")
CONFIGURATION = FOLDER / f"{INTERFACE}.conf"
# Made on the host; it never leaves the host.
KEY = FOLDER / f"{INTERFACE}.key"
DROP_IN = Path(f"/etc/systemd/system/{UNIT}.d/hivewright.conf")
# A reload by Debian's own unit would lose the key, which is not in the configuration.
RELOAD = f"""\
[Service]
ExecReload=
ExecReload=/bin/sh -c '{{ printf "[Interface]\\\\nPrivateKey = "; cat {KEY}; \
wg-quick strip %i | sed 1d; }} | wg syncconf %i /dev/stdin'
"""
# Value for the endpoint of a host behind a router.
NOBODY = "none"
KEEPALIVE_SECONDS = 25
# Priority before the rules of other programs, and after the host's own addresses.
RULE_PRIORITY = 8600
EXPECTED_ENDPOINT = f"a name or an address without a port, or {NOBODY!r} behind a router"


@dataclass(frozen=True, slots=True)
class Member:
    """A host of the mesh.

    `endpoint`: address and port at which others reach it; None: it only connects to them.
    """

    name: str
    address: Address
    network: Network
    port: int
    endpoint: str | None
    is_hub: bool

    @property
    def own_route(self) -> str:
        return f"{self.address}/{self.address.max_prefixlen}"


def members(
    deployments: Mapping[str, Deployment], data: Mapping[str, Mapping[str, Any]]
) -> dict[str, Member]:
    """Return the hosts of the mesh by name, from inventory data without mistakes."""
    found = {}
    for name, deployment in deployments.items():
        if deployment.wireguard:
            found[name] = _member(name, deployment, data[name])
    return found


def mistakes(
    deployments: Mapping[str, Deployment], data: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """Yield host and message for each mistake in the inventory's WireGuard keys."""
    inside = {name: of for name, of in deployments.items() if of.wireguard}
    networks = {of.wireguard_subnet for of in inside.values()}
    if len(networks) > 1:
        for name, of in inside.items():
            others = ", ".join(sorted(networks - {of.wireguard_subnet}))
            yield (
                name,
                (
                    f"wireguard_subnet: got {of.wireguard_subnet!r}, and {others} elsewhere;"
                    " expected one for all"
                ),
            )
    found = []
    for name, of in inside.items():
        wrong = list(_mistakes(of, name, data[name]))
        yield from ((name, message) for message in wrong)
        if not wrong:
            found.append(_member(name, of, data[name]))
    yield from _clashes(found)
    hidden = [member for member in found if member.endpoint is None]
    if len(hidden) > 1 and not any(member.is_hub for member in found):
        for member in hidden:
            yield (
                member.name,
                (
                    f"wireguard_endpoint: got {NOBODY!r}, here and on other hosts, which then can't"
                    " reach each other; make a host that all can reach their hub (wireguard_hub)"
                ),
            )


def _mistakes(
    deployment: Deployment,
    name: str,
    data: Mapping[str, Any],
) -> Iterator[str]:
    try:
        network = ipaddress.ip_network(deployment.wireguard_subnet)
    except ValueError as error:
        yield f"wireguard_subnet: {error}; expected a network, such as 10.86.0.0/16"
        return
    if network.num_addresses < 4 or network.prefixlen < 8:
        yield (
            f"wireguard_subnet: got {deployment.wireguard_subnet!r}, too small or too large;"
            " expected such as 10.86.0.0/16"
        )
        return
    if deployment.wireguard_address is not None:
        try:
            address = ipaddress.ip_address(deployment.wireguard_address)
            is_inside = address in network and address not in (network[0], network[-1])
        except ValueError:
            is_inside = False
        if not is_inside:
            yield (
                f"wireguard_address: got {deployment.wireguard_address!r}; expected an address of a"
                f" host in {network}"
            )
    where = _endpoint(deployment, name, data)
    if where == NOBODY:
        if deployment.wireguard_hub:
            yield (
                f"wireguard_endpoint: got {NOBODY!r}, and wireguard_hub; a hub is what the others"
                " reach"
            )
        return
    own = (
        "wireguard_endpoint"
        if deployment.wireguard_endpoint is not None
        else "wireguard_endpoint: none, and ssh_hostname"
    )
    if not is_host(where) or not is_reachable(where):
        yield f"{own}: got {where!r}; expected {EXPECTED_ENDPOINT}"
    elif is_address(where) and ipaddress.ip_address(where) in network:
        yield (
            f"{own}: got {where!r}, which is in the mesh's own {network}; expected its address"
            " outside of it"
        )


def _clashes(found: Collection[Member]) -> Iterator[tuple[str, str]]:
    users: dict[Address, str] = {}
    for member in found:
        other = users.setdefault(member.address, member.name)
        if other != member.name:
            taken = (
                f"{member.address} is that of {other} too; give it another, or take a larger"
                " wireguard_subnet"
            )
            yield member.name, f"wireguard_address: {taken}"


def _member(
    name: str,
    deployment: Deployment,
    data: Mapping[str, Any],
) -> Member:
    network = ipaddress.ip_network(deployment.wireguard_subnet)
    where = _endpoint(deployment, name, data)
    host = f"[{where}]" if ":" in where else where
    endpoint = None if where == NOBODY else f"{host}:{deployment.wireguard_port}"
    if deployment.wireguard_address is not None:
        address = ipaddress.ip_address(deployment.wireguard_address)
    else:
        digest_of_name = hashlib.sha256(name.encode()).digest()
        number = int.from_bytes(digest_of_name[:16])
        address = network[1 + number % (network.num_addresses - 2)]
    return Member(
        name, address, network, deployment.wireguard_port, endpoint, deployment.wireguard_hub
    )


def _endpoint(
    deployment: Deployment,
    name: str,
    data: Mapping[str, Any],
) -> str:
    if deployment.wireguard_endpoint is not None:
        return deployment.wireguard_endpoint
    return str(data.get("ssh_hostname") or name)


def configuration(
    me: Member,
    all_members: Collection[Member],
    keys: Mapping[str, str],
) -> str:
    """Return the text of CONFIGURATION, which has no secrets.

    `keys`: public keys by host; hosts without one are left out.
    """
    lines = [
        "[Interface]",
        "# Written by hivewright's deploy; the next one overwrites what is changed here.",
        f"Address = {me.address}/{me.network.prefixlen}",
        f"ListenPort = {me.port}",
        f"PostUp = wg set %i private-key {KEY}",
        *(_passing_on(me.network) if me.is_hub else ()),
    ]
    for peer, routes in _peers(me, all_members).items():
        if peer.name not in keys:
            continue
        lines += ["", "[Peer]", f"# {peer.name}"]
        lines.append(f"PublicKey = {keys[peer.name]}")
        lines.append(f"AllowedIPs = {', '.join(routes)}")
        if peer.endpoint:
            lines.append(f"Endpoint = {peer.endpoint}")
        if me.endpoint is None:
            # A host that nobody can reach keeps its own connections open.
            lines.append(f"PersistentKeepalive = {KEEPALIVE_SECONDS}")
    return "\n".join([*lines, ""])


def digest(text: str) -> str:
    """Return the digest of a host's mesh configuration, without its key."""
    return hashlib.sha256((text + RELOAD).encode()).hexdigest()


def _passing_on(network: Network) -> Iterator[str]:
    """Yield the settings with which a hub forwards traffic within the mesh and nowhere else."""
    family = f"ipv{network.version}"
    rule = f"ip -{network.version} rule"
    within = f"iif %i to {network} lookup main priority {RULE_PRIORITY}"
    beyond = f"iif %i prohibit priority {RULE_PRIORITY + 1}"
    yield f"PostUp = echo 1 > /proc/sys/net/{family}/conf/%i/forwarding"
    for each in (within, beyond):
        yield f"PostUp = {rule} add {each}"
        yield f"PreDown = {rule} del {each}"


def _peers(
    me: Member,
    all_members: Collection[Member],
) -> dict[Member, list[str]]:
    """Return the peers of a host, each with the addresses that are routed to it."""
    others = sorted(set(all_members) - {me}, key=attrgetter("name"))
    hubs = [member for member in all_members if member.is_hub]
    if not hubs:
        return {member: [member.own_route] for member in others}
    if not me.is_hub:
        return {_hub_of(me, hubs): [str(me.network)]}
    routes = {hub: [hub.own_route] for hub in others if hub.is_hub}
    for member in others:
        if not member.is_hub:
            hub = _hub_of(member, hubs)
            # Its own hub reaches it directly, other hubs reach it through that hub.
            via = member if hub == me else hub
            routes.setdefault(via, []).append(member.own_route)
    return routes


def _hub_of(
    member: Member,
    hubs: Collection[Member],
) -> Member:
    """Return a host's hub by rendezvous hashing: it changes only if hubs come or go."""

    def weight(hub: Member) -> bytes:
        return hashlib.sha256(f"{hub.name} {member.name}".encode()).digest()

    return max(hubs, key=weight)
