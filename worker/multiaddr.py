"""Syntax of libp2p's peer ids and addresses.

Settings, messages, the account service and readers of the chain use it. A peer id is base58: 46
characters (Qm...) for the RSA keys of this swarm, up to 62 for other keys of libp2p. Whether an id
is the hash of a key can be checked only with the key (swarm/identity.py).
"""

import re

P2P = "/p2p/"
RELAYED = "/p2p-circuit"
MAX_ADDRESS_LENGTH = 256
MAX_RECORDED_ID_LENGTH = 512

BASE58 = "[1-9A-HJ-NP-Za-km-z]"
PEER_ID = BASE58 + "{16,64}"
PEER_ID_TO_REGISTER = BASE58 + "{1,128}"
"""Clients of RL Swarm register any name as a peer id; the account service accepts that."""

_RSA_PEER_ID = f"Qm{BASE58}{{44}}"
_PEER_ID = re.compile(PEER_ID)
_ADDRESS = re.compile(
    r"/(ip4|ip6|dns|dns4|dns6)/[0-9A-Za-z.:_-]+/(tcp|udp)/[0-9]{1,5}(/[0-9A-Za-z.:_-]+)*"
)
_TCP_PEER = re.compile(
    rf"/(?:ip4|ip6|dns|dns4|dns6)/([0-9A-Za-z.:-]{{1,253}})/tcp/([0-9]{{1,5}})/p2p/({_RSA_PEER_ID})"
)


def is_peer_id(text: str) -> bool:
    return _PEER_ID.fullmatch(text) is not None


def is_recorded_id(text: str) -> bool:
    """Return whether the text is short enough to be a peer id in the log of a coordinator.

    A foreign contract accepts any text.
    """
    return len(text) <= MAX_RECORDED_ID_LENGTH


def is_address(text: str) -> bool:
    """Return whether peers accept a record with this address."""
    return len(text) <= MAX_ADDRESS_LENGTH and _ADDRESS.fullmatch(text) is not None


def split_peer(multiaddr: str) -> tuple[str, str]:
    """Return address and peer id of ADDRESS/p2p/PEER.

    The address is empty if `multiaddr` does not have that form.
    """
    address, _, peer_id = multiaddr.rpartition(P2P)
    return address, peer_id


def match_tcp_peer(multiaddr: str) -> tuple[str, int, str] | None:
    """Return host, port and peer id of a direct TCP address of a peer with an RSA key.

    None for any other address.
    """
    match = _TCP_PEER.fullmatch(multiaddr)
    return None if match is None else (match[1], int(match[2]), match[3])
