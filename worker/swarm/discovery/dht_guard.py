"""Limits on the requests that untrusted peers send to our DHT node, and on their answers.

hivemind's own node accepts any number of keys in a request, any number of requests, and any place
in the DHT (a Kademlia node id) that a node claims. So one message of 4 MB keeps the node, and with
it the exchange of groups, busy for seconds, and one untrusted peer can pose as all its neighbours.
A neighbour in an answer may have a peer id of any length: decoding 60 KB of base 58 takes 5 s, in
the event loop.

Here a node's place is the hash of its peer id, which libp2p has authenticated. A peer that claims
another place is answered, but does not become a neighbour.
"""

import logging
import math
from collections.abc import Awaitable, Callable
from functools import lru_cache, wraps
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2PContext, PeerID

from worker.errors import BadRecord
from worker.swarm.log_throttle import LogThrottle
from worker.swarm.transport.streams import REQUEST_WINDOW_SECONDS, Rate

log = logging.getLogger(__name__)

MAX_KEYS = 64
"""Number of keys in a request. Ours have one; when a node moves records to a neighbour, a few."""
MAX_REQUESTS_PER_PEER = 400
"""Number of a peer's requests of one kind within REQUEST_WINDOW_SECONDS."""
MAX_STORES_PER_PEER = 40
"""Number of a peer's requests to store, in the same time; each has to be verified.

A peer stores its own record once a minute.
"""
MAX_STORED_BYTES = 256 << 10
"""Bytes to store in one request: a bucket that is full of the largest records."""
MAX_NEIGHBOURS = 20
"""Number of neighbours in an answer for each key: as many as hivemind's nodes send."""
MAX_PEER_ID_BYTES = 64

_CALLS = ("rpc_ping", "rpc_find", "rpc_store")

_rates: "WeakKeyDictionary[Any, dict[str, Rate]]" = WeakKeyDictionary()
_throttle = LogThrottle()


@lru_cache(maxsize=4096)
def place_of(peer_id: str) -> DHTID:
    """Return the place of a peer in the DHT."""
    return DHTID.generate(peer_id)


def install() -> None:
    """Guard the DHT nodes of this process whose place is the one that `place_of` returns.

    Call it once, before the first node is created.
    """
    for name in _CALLS:
        setattr(DHTProtocol, name, _guarded(getattr(DHTProtocol, name)))
    DHTProtocol.update_routing_table = _only_own_places(DHTProtocol.update_routing_table)
    DHTProtocol.get_stub = _with_checked_answers(DHTProtocol.get_stub)
    DHTProtocol.call_find = _without_false_places(DHTProtocol.call_find)


def _guarded(answer: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @wraps(answer)
    async def guarded(
        protocol: Any,
        request: Any,
        context: P2PContext,
    ) -> Any:
        # hivemind makes a ping of every other request.
        is_inner_ping = not context.handle_name.endswith(answer.__name__)
        if is_inner_ping or not _is_ours(protocol):
            return await answer(protocol, request, context)
        peer_id = context.remote_id.to_base58()
        if len(request.peer.node_id) != DHTID.HASH_NBYTES:  # not a valid place
            request.peer.node_id = b""
        most = MAX_STORES_PER_PEER if answer.__name__ == "rpc_store" else MAX_REQUESTS_PER_PEER
        if (
            not _rates.setdefault(protocol, {})
            .setdefault(answer.__name__, Rate(most))
            .allows(peer_id)
        ):
            _refuse(peer_id, "flood", f"more than {most} requests in {REQUEST_WINDOW_SECONDS:g} s")
        if (num_keys := len(getattr(request, "keys", ()))) > MAX_KEYS:
            _refuse(
                peer_id,
                "too-large",
                f"request with {num_keys} keys; at most {MAX_KEYS} are accepted",
            )
        if (num_bytes := sum(map(len, getattr(request, "values", ())))) > MAX_STORED_BYTES:
            _refuse(
                peer_id,
                "too-large",
                f"{num_bytes} bytes to store; at most {MAX_STORED_BYTES} are accepted",
            )
        if answer.__name__ != "rpc_ping" or not request.validate:
            return await answer(protocol, request, context)
        # The peer asks whether we can reach it. hivemind would ping back, with one of the few calls
        # that our node may have open at once. We need not: this request came through a connection.
        request.validate = False
        response = await answer(protocol, request, context)
        response.available = True
        return response

    return guarded


def _is_ours(protocol: Any) -> bool:
    """Return whether the node is ours; hivemind's own nodes have random places."""
    return bool(protocol.node_id == place_of(protocol.p2p.peer_id.to_base58()))


def _refuse(
    peer_id: str,
    reason: str,
    explanation: str,
) -> None:
    """Raise BadRecord, whose text is sent to the peer; log it from time to time."""
    level = logging.DEBUG if _throttle.has((peer_id, reason)) else logging.WARNING
    log.log(level, "DHT request refused peer=%s reason=%s: %s", peer_id, reason, explanation)
    raise BadRecord(reason, explanation)


def _with_checked_answers(get_stub: Callable[..., Any]) -> Callable[..., Any]:
    """Check the answers to our node's calls.

    An invalid answer counts as a failed call, and the peer is removed from the neighbours.
    """

    @wraps(get_stub)
    def checked(protocol: Any, peer: PeerID) -> Any:
        stub = get_stub(protocol, peer)
        return SimpleNamespace(**{name: _checked(getattr(stub, name)) for name in _CALLS})

    return checked


def _checked(call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @wraps(call)
    async def checked(*arguments: Any, **options: Any) -> Any:
        response = await call(*arguments, **options)
        if len(response.peer.node_id) not in (0, DHTID.HASH_NBYTES):
            raise BadRecord("malformed", f"place in the DHT of {len(response.peer.node_id)} bytes")
        for result in getattr(response, "results", ()):
            names = result.nearest_peer_ids
            if len(names) > MAX_NEIGHBOURS or any(len(name) > MAX_PEER_ID_BYTES for name in names):
                raise BadRecord("too-large", f"{len(names)} neighbours, or names that are too long")
            # A search would stop at such a value, whatever other nodes have.
            if not math.isfinite(result.expiration_time):
                raise BadRecord("malformed", "value that never expires")
        return response

    return checked


def _only_own_places(update: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @wraps(update)
    async def checked(
        protocol: Any,
        node_id: DHTID | None,
        peer_id: PeerID,
        responded: bool = True,
    ) -> None:
        if not responded or not _is_ours(protocol) or node_id == place_of(peer_id.to_base58()):
            await update(protocol, node_id, peer_id, responded)

    return checked


def _without_false_places(find: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @wraps(find)
    async def checked(
        protocol: Any,
        peer: PeerID,
        keys: Any,
    ) -> Any:
        found = await find(protocol, peer, keys)
        if found is None or not _is_ours(protocol):
            return found
        return {
            key: (
                value,
                {node: who for node, who in nearest.items() if node == place_of(who.to_base58())},
            )
            for key, (value, nearest) in found.items()
        }

    return checked
