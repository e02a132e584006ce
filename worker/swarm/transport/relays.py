"""Choose relays, among the known ones, for a node that others can't connect to."""

import asyncio
from collections.abc import Iterable

from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

from worker.multiaddr import match_tcp_peer

PROBE_TIMEOUT_SECONDS = 2.0


async def find(addresses: Iterable[str]) -> list[str]:
    """Return an address of each relay that accepts connections now; if none does, of every relay.

    libp2p waits up to three minutes for all relays that it is given, before it uses those that
    answer.
    """
    candidates: dict[str, list[tuple[str, str, int]]] = {}
    for address in dict.fromkeys(addresses):
        place = match_tcp_peer(address)
        if place is not None and is_dialable(address):
            host, port, peer_id = place
            candidates.setdefault(peer_id, []).append((address, host, port))
    found = await asyncio.gather(*map(_first_that_answers, candidates.values()))
    answering = [address for address in found if address]
    return answering or [places[0][0] for places in candidates.values()]


def is_dialable(address: str) -> bool:
    """Return whether p2pd accepts this address of a peer as a relay; with any other it exits.

    Bootnodes on the chain are untrusted text.
    """
    place = match_tcp_peer(address)
    if place is None:
        return False
    try:
        peer_id = PeerID.from_base58(place[2]).to_bytes()
        Multiaddr(address).to_bytes()
    except (ValueError, LookupError):
        return False
    return len(peer_id) == 34 and peer_id.startswith(b"\x12\x20")  # a SHA-256 multihash


async def _first_that_answers(places: list[tuple[str, str, int]]) -> str | None:
    for address, host, port in places:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                _, writer = await asyncio.open_connection(host, port)
        except (OSError, TimeoutError):
            continue
        writer.close()
        return address
    return None
