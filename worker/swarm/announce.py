"""Announce the address of a network interface to peers, in addition to those in the settings."""

import logging
import socket

from worker.runtime import host
from worker.settings import Swarm

log = logging.getLogger(__name__)


def with_interface_address(swarm: Swarm) -> Swarm:
    """Return the settings with the interface's current address added to `announce`.

    If the interface has no address, log a warning and return them unchanged: the node still trains.
    """
    if swarm.announce_interface is None:
        return swarm
    is_ipv6 = ":" in swarm.host
    address = host.interface_address(
        swarm.announce_interface, socket.AF_INET6 if is_ipv6 else socket.AF_INET
    )
    if address is None:
        other = host.interface_address(
            swarm.announce_interface, socket.AF_INET if is_ipv6 else socket.AF_INET6
        )
        wanted = "an IPv4 one" if is_ipv6 else "an IPv6 one, such as ::"
        hint = f"it has {other}, and swarm.host is {swarm.host}: make that {wanted}"
        log.warning(
            "no address to announce interface=%s, %s",
            swarm.announce_interface,
            hint if other else "is it up?",
        )
        return swarm
    own = f"/{'ip6' if is_ipv6 else 'ip4'}/{address}/tcp/{swarm.port}"
    return swarm.model_copy(update={"announce": (*swarm.announce, own)})
