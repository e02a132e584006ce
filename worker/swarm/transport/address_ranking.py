"""Rank a machine's addresses by how useful they are to peers.

A record has room for eight addresses, and a peer that stores addresses for its next start stores
the first two. So globally reachable ones come first, and those in networks inside this machine
(such as containers') are left out.
"""

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from worker.multiaddr import RELAYED
from worker.runtime.host import interface_address

INTERFACES = Path("/sys/class/net")

_HOST = re.compile(r"/ip[46]/([^/]+)")
_NAME = re.compile(r"/dns[46]?/")


def ranked(
    addresses: Iterable[str],
    inner: frozenset[str] = frozenset(),
) -> tuple[str, ...]:
    """Return multiaddrs, the most useful first, without those of `inner` hosts.

    Public addresses and names come first, then addresses at a relay, private networks, link-local
    addresses and loopback. `inner` hosts are kept if there are no others except loopback.
    """
    known = sorted(dict.fromkeys(addresses), key=lambda address: (_rank(address), address))
    outer = [address for address in known if _host_of(address) not in inner]
    is_reachable = any(_rank(address) < _LOOPBACK for address in outer)
    return tuple(outer if is_reachable else known)


_PUBLIC, _RELAY, _PRIVATE, _LINK_LOCAL, _LOOPBACK = range(5)


def _rank(address: str) -> int:
    if RELAYED in address:
        return _RELAY
    if _NAME.match(address):
        return _PUBLIC
    try:
        host: IPv4Address | IPv6Address = ip_address(_host_of(address))
    except ValueError:
        return _PRIVATE
    if host.is_loopback:
        return _LOOPBACK
    if host.is_link_local:
        return _LINK_LOCAL
    return _PUBLIC if host.is_global else _PRIVATE


def _host_of(address: str) -> str:
    match = _HOST.match(address)
    return match[1] if match else ""


def inner_hosts(interfaces: Path = INTERFACES) -> frozenset[str]:
    """Return this machine's IPv4 addresses on bridges without a physical port.

    Docker, libvirt and CNI make such bridges. A bridge that contains a network card (such as a
    hypervisor's own) leads outside, so its addresses are not included.
    """
    try:
        bridges = [folder for folder in interfaces.iterdir() if (folder / "bridge").is_dir()]
    except OSError:  # no sysfs: the bridges are unknown
        return frozenset()
    addresses = set()
    for bridge in bridges:
        # A physical network card has a device; the ports of containers have none.
        ports = [interfaces / port.name for port in (bridge / "brif").glob("*")]
        is_inner = not any((port / "device").exists() for port in ports)
        address = interface_address(bridge.name) if is_inner else None
        if address is not None:
            addresses.add(address)
    return frozenset(addresses)
