"""Types of single settings, and the base class of sections."""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from worker import multiaddr

URL_PATTERN = r"^https?://[^\s]+$"
ADDRESS_PATTERN = r"^0x[0-9a-fA-F]{40}$"
PEER_ID_PATTERN = f"^{multiaddr.PEER_ID}$"

# The multiaddrs that peers accept in a membership record.
_MULTIADDR = re.compile(
    r"/(ip4|ip6|dns|dns4|dns6)/([0-9A-Za-z.:_-]{1,200})"
    r"/(?:tcp|udp)/([0-9]{1,5})(?:/[0-9A-Za-z.:_-]+)*"
)
_LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_DOMAIN_NAME = re.compile(rf"{_LABEL}([.]{_LABEL})*[.]?")
_IP_ADDRESSES = {"ip4": IPv4Address, "ip6": IPv6Address}
_MAX_SHOWN = 60  # characters of a wrong value in a message


def shorten(value: Any) -> str:
    """Return the repr of a value, cut to a length that fits into a message."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def is_host(text: str) -> bool:
    """Return whether `text` is a domain name or IP address, without scheme, port or brackets."""
    try:
        ip_address(text)
    except ValueError:
        return _DOMAIN_NAME.fullmatch(text) is not None
    return True


def _check_host(text: str) -> str:
    if not is_host(text):
        raise ValueError(
            f"got {shorten(text)}; expected a name or an address, without http:// and port"
        )
    return text


def _is_multiaddr(text: str) -> bool:
    match = _MULTIADDR.fullmatch(text)
    if match is None or int(match[3]) > 65535:
        return False
    try:
        _IP_ADDRESSES.get(match[1], str)(match[2])
    except ValueError:
        return False
    return True


def _check_network(text: str) -> str:
    try:
        ip_network(text)
    except ValueError:
        raise ValueError(f"got {shorten(text)}; expected a network such as 10.0.0.0/8") from None
    return text


def _check_multiaddr(text: str) -> str:
    if not _is_multiaddr(text):
        raise ValueError(
            f"got {shorten(text)}; expected an address such as /ip4/192.0.2.1/tcp/38000"
        )
    return text


def _check_peer(text: str) -> str:
    if multiaddr.P2P not in text:
        raise ValueError(f"got {shorten(text)}; expected /p2p/ and the peer id at its end")
    _, peer_id = multiaddr.split_peer(text)
    if not multiaddr.is_peer_id(peer_id):
        raise ValueError(f"got {shorten(text)}; {peer_id} is not a peer id")
    return text


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Port = Annotated[int, Field(ge=0, le=65535)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0, le=8)]
Address = Annotated[str, Field(pattern=ADDRESS_PATTERN)]
PeerId = Annotated[str, Field(pattern=PEER_ID_PATTERN)]
Url = Annotated[str, Field(pattern=URL_PATTERN)]
Urls = Annotated[tuple[Url, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
Host = Annotated[str, AfterValidator(_check_host)]
Network = Annotated[str, AfterValidator(_check_network)]
Multiaddr = Annotated[str, AfterValidator(_check_multiaddr)]
PeerMultiaddr = Annotated[Multiaddr, AfterValidator(_check_peer)]


class Section(BaseModel):
    """A section of a settings file: immutable, with known keys and exact types only."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
