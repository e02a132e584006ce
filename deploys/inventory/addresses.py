"""Check addresses of hosts in an inventory, and whether other hosts can reach them."""

import contextlib
import ipaddress
from collections.abc import Mapping
from typing import Any

from worker import settings

EXPECTED_SSH_HOST = "expected a name or an address, without a port (ssh_port)"


def is_ssh_host(text: str) -> bool:
    """Return whether `text` is a host; its name may need encoding by the resolver."""
    try:
        return settings.is_host(text.encode("idna").decode())
    except UnicodeError:
        return False


def is_address(value: object) -> bool:
    """Return whether a value is the text of an IP address."""
    try:
        ipaddress.ip_address(str(value))
    except ValueError:
        return False
    return True


def is_reachable(host: object) -> bool:
    """Return whether other hosts can reach a service that listens on this address."""
    try:
        address = ipaddress.ip_address(str(host))
    except ValueError:
        return host != "localhost"
    return not (address.is_unspecified or address.is_loopback)


def bootnode_announce(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the bootnode's public address, which is the account service's host by default."""
    host, port = (
        data.get("account_host", "localhost"),
        data.get("bootnode_port", settings.Bootnode().port),
    )
    if "bootnode_announce" in data or not port or not is_reachable(host):
        return {}
    kind = "dns"
    with contextlib.suppress(ValueError):
        kind = f"ip{ipaddress.ip_address(str(host)).version}"
    return {"bootnode_announce": [f"/{kind}/{host}/tcp/{port}"]}
