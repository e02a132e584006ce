"""Find the user whose process made a connection to us, from the kernel's tables of sockets."""

import ipaddress
import sys
from pathlib import Path

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ESTABLISHED = "01"
_WORD_DIGITS = 8

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Place = tuple[Address, int]


def owner_of(peer: tuple[str, int], own: tuple[str, int]) -> int | None:
    """Return the user id at the other end of a connection on this machine; None: unknown.

    `peer` and `own` are addresses with ports. Only the established connection between exactly these
    counts, because the kernel lists closing sockets as those of user 0.
    """
    wanted = [(_plain(ipaddress.ip_address(host)), port) for host, port in (peer, own)]
    for table in _TABLES:
        for line in table.read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _ESTABLISHED and [_place(each) for each in fields[1:3]] == wanted:
                return int(fields[7])
    return None


def _place(text: str) -> Place:
    """Return address and port of a row: hexadecimal words in the machine's byte order."""
    words, _, port = text.partition(":")
    packed = b"".join(
        int(words[at : at + _WORD_DIGITS], 16).to_bytes(4, sys.byteorder)
        for at in range(0, len(words), _WORD_DIGITS)
    )
    return _plain(ipaddress.ip_address(packed)), int(port, 16)


def _plain(address: Address) -> Address:
    """Convert an IPv4-mapped IPv6 address to the IPv4 address; return others unchanged."""
    return getattr(address, "ipv4_mapped", None) or address
