"""What strangers may ask of our DHT node. hivemind's own takes any number of keys in a request, any number of requests,
and whatever place in the DHT a node claims: one message of 4 MB keeps it, and the exchange beside it, busy for
seconds, and one stranger can stand for all its neighbours.

Here a node's place is the hash of its peer id, which libp2p has authenticated; who claims another one is answered, and
is nobody's neighbour.
"""

import logging
from collections.abc import Awaitable, Callable
from functools import lru_cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2PContext, PeerID

from worker.errors import BadRecord
from worker.swarm.streams import REQUEST_WINDOW_SECONDS, Lately, Rate

log = logging.getLogger(__name__)

MAX_KEYS = 64
"""In one request. Ours have one; a node that hands over what it stores to a new neighbour sends a few."""
MAX_REQUESTS_PER_PEER = 400
"""Within REQUEST_WINDOW_SECONDS."""

_rates: "WeakKeyDictionary[Any, Rate]" = WeakKeyDictionary()
_said = Lately()


@lru_cache(maxsize=4096)
def place_of(peer_id: str) -> DHTID:
    """Where in the DHT a peer is."""
    return DHTID.generate(peer_id)


def install() -> None:
    """Make the nodes of this process that are where `place_of` says answer so. To be called once, before the first one
    is made."""
    for name in ("rpc_ping", "rpc_find", "rpc_store"):
        setattr(DHTProtocol, name, _guarded(getattr(DHTProtocol, name)))
    DHTProtocol.update_routing_table = _only_own_places(DHTProtocol.update_routing_table)
    DHTProtocol.call_find = _without_false_places(DHTProtocol.call_find)


def _guarded(answer: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @wraps(answer)
    async def guarded(protocol: Any, request: Any, context: P2PContext) -> Any:
        is_inner_ping = not context.handle_name.endswith(answer.__name__)  # hivemind makes one of every other request
        if is_inner_ping or not _is_ours(protocol):
            return await answer(protocol, request, context)
        peer_id = context.remote_id.to_base58()
        if len(request.peer.node_id) != DHTID.HASH_NBYTES:  # no place at all
            request.peer.node_id = b""
        if not _rates.setdefault(protocol, Rate(MAX_REQUESTS_PER_PEER)).allows(peer_id):
            _refuse(peer_id, "flood", f"more than {MAX_REQUESTS_PER_PEER} requests in {REQUEST_WINDOW_SECONDS:g} s")
        if (num_keys := len(getattr(request, "keys", ()))) > MAX_KEYS:
            _refuse(peer_id, "too-large", f"request with {num_keys} keys; at most {MAX_KEYS} are looked at")
        return await answer(protocol, request, context)

    return guarded


def _is_ours(protocol: Any) -> bool:
    """False: hivemind's own node beside ours, such as in a benchmark; it has a place at random."""
    return bool(protocol.node_id == place_of(protocol.p2p.peer_id.to_base58()))


def _refuse(peer_id: str, reason: str, explanation: str) -> None:
    """Raises BadRecord, whose text the asker gets. Said once in a while."""
    level = logging.DEBUG if _said.has((peer_id, reason)) else logging.WARNING
    log.log(level, "DHT request refused peer=%s reason=%s: %s", peer_id, reason, explanation)
    raise BadRecord(reason, explanation)


def _only_own_places(update: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @wraps(update)
    async def checked(protocol: Any, node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        if not responded or not _is_ours(protocol) or node_id == place_of(peer_id.to_base58()):
            await update(protocol, node_id, peer_id, responded)

    return checked


def _without_false_places(find: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @wraps(find)
    async def checked(protocol: Any, peer: PeerID, keys: Any) -> Any:
        found = await find(protocol, peer, keys)
        if found is None or not _is_ours(protocol):
            return found
        return {
            key: (value, {node: who for node, who in nearest.items() if node == place_of(who.to_base58())})
            for key, (value, nearest) in found.items()
        }

    return checked
