"""Membership: signed records in a Kademlia DHT (hivemind's `DHTNode`, in our own event loop).

Records are stored in buckets, each with a DHT key of its own. The first has room for `BUCKET_SIZE`
members; a peer that finds a bucket full goes one level deeper, where there are eight times as many
buckets; a hash of the peer id chooses its bucket. So no key grows with the swarm, a small swarm is
read in one lookup, and the cost for a node stays the same. Groups never pass through the DHT.

hivemind's node would decode untrusted bytes with a recursive decoder (12 KB of them end the
process) and store without bounds; both are replaced below. dht_guard.py limits the requests of
untrusted peers.
"""

import asyncio
import hashlib
import logging
import math
import random
import time
from collections import Counter
from functools import lru_cache
from typing import Any

import msgpack
import msgspec
from hivemind.dht import DHTNode
from hivemind.dht.crypto import RecordValidatorBase
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2P, PeerID
from hivemind.utils import MSGPackSerializer
from hivemind.utils.multiaddr import Multiaddr

from worker.errors import BadRecord, SwarmError
from worker.swarm.discovery import dht_guard
from worker.swarm.protocol.codec import Schema, at_most, binary, is_text, record
from worker.swarm.protocol.messages import MAX_MEMBER_BYTES, Member, is_genuine, read_member
from worker.swarm.transport.daemon import Daemon

log = logging.getLogger(__name__)

BUCKET_SIZE = 32
BUCKET_HARD_LIMIT = 2 * BUCKET_SIZE
"""Largest number of members of a bucket that a node stores.

It is above BUCKET_SIZE, because nodes that start together may all see room in the bucket.
"""
FAN_OUT = 8
MAX_DEPTH = 4
MAX_VALUE_BYTES = BUCKET_HARD_LIMIT * (MAX_MEMBER_BYTES + 96)
"""Size of a whole bucket: each record with its key, its time and the headers between them."""
MAX_LIFETIME_SECONDS = 3600
MAX_AHEAD_SECONDS = 600
"""Limit on how far in the future a record may be issued: clocks are minutes off."""
RPC_TIMEOUT_SECONDS = 3.0
READ_TIMEOUT_SECONDS = 10.0
NUM_REPLICAS = 5
BEAM_SIZE = 10
"""Nearest nodes that a lookup queries before it ends: enough to find 5 replicas."""
THOROUGH_EVERY = 8
"""One in this many reads, announcements and searches for neighbours queries all replicas.

The others query fewer nodes if the last one succeeded.
"""
ENOUGH_FOUND = 16
ENOUGH_NEIGHBOURS = 8

_DICTIONARY_CODE = 0x50
_TEXT = Schema(str)
_VALUE = Schema(bytes | msgspec.msgpack.Ext)
# The content of a bucket: its capacity at the sender, the latest expiration, and key, record and
# expiration of each member.
_ITEM = record(str, binary(MAX_MEMBER_BYTES + 8), float)
_DICTIONARY = Schema(record(int | float | None, float, at_most(_ITEM, BUCKET_HARD_LIMIT)))
_STORED = Schema(binary(MAX_MEMBER_BYTES))


def bucket_of(peer_id: str, depth: int) -> int:
    """Return the bucket of a peer at a depth: 0 to FAN_OUT**depth - 1."""
    num_buckets: int = FAN_OUT**depth
    return int.from_bytes(hashlib.sha256(peer_id.encode()).digest()[:8], "big") % num_buckets


def _key(depth: int, bucket: int) -> str:
    return f"hivewright/1/members/{depth}/{bucket}"


@lru_cache(maxsize=1)
def _bucket_depths() -> dict[bytes, tuple[int, int]]:
    """Return (depth, bucket) of each key that may be stored, by its DHT id."""
    return {
        DHTID.generate(_key(depth, bucket)).to_bytes(): (depth, bucket)
        for depth in range(MAX_DEPTH)
        for bucket in range(FAN_OUT**depth)
    }


class _FlatSerializer(MSGPackSerializer):  # type: ignore[misc]
    """hivemind's format, limited to text, bytes, and dictionaries of bytes."""

    @classmethod
    def loads(cls, buf: bytes) -> Any:
        """Decode a value. Raises BadRecord."""
        if len(buf) > MAX_VALUE_BYTES:
            raise BadRecord(
                "too-large", f"value of {len(buf)} bytes; at most {MAX_VALUE_BYTES} are read"
            )
        value = _TEXT.decode(buf) if is_text(buf) else _VALUE.decode(buf)
        if not isinstance(value, msgspec.msgpack.Ext):
            return value
        if value.code != _DICTIONARY_CODE:
            raise BadRecord("malformed", f"extension {value.code}; only dictionaries travel here")
        return _read_dictionary(bytes(value.data))


def _read_dictionary(data: bytes) -> DictionaryDHTValue:
    _, latest, items = _DICTIONARY.decode(data)
    times = [latest, *(expires for _, _, expires in items)]
    if not all(map(math.isfinite, times)):
        raise BadRecord("malformed", "expiration time that is not finite")
    dictionary = DictionaryDHTValue()
    with dictionary.freeze():
        for key, value, expires in items:
            dictionary.store(key, value, expires)
    dictionary.latest_expiration_time = latest
    return dictionary


# Before the first node is created: its handlers decode untrusted data.
DHTProtocol.serializer = _FlatSerializer
dht_guard.install()


class _BoundedStorage(DHTLocalStorage):  # type: ignore[misc]
    """Storage of up to BUCKET_HARD_LIMIT members per bucket; old records never replace new ones."""

    def store_subkey(
        self,
        key: Any,
        subkey: Any,
        value: Any,
        expiration_time: float,
    ) -> bool:
        held = self.get(key)
        if held is not None and isinstance(held.value, DictionaryDHTValue):
            present = held.value.get(subkey)
            if present is not None and present.expiration_time >= expiration_time:
                return False
            if present is None and len(held.value) >= BUCKET_HARD_LIMIT:
                return False
        return bool(super().store_subkey(key, subkey, value, expiration_time))


class _MemberValidator(RecordValidatorBase):  # type: ignore[misc]
    """Accepts only genuine membership records: right bucket and owner, bounded lifetime, signed.

    The signature is the most expensive check, so it comes last.
    """

    def validate(self, record: DHTRecord) -> bool:
        place = _bucket_depths().get(record.key)
        if place is None or len(record.value) > MAX_MEMBER_BYTES + 8:
            return False
        member = _read(bytes(record.value))
        now = time.time()
        return (
            member is not None
            and record.subkey == msgpack.packb(member.peer_id)
            and record.expiration_time == float(member.expires)
            and member.expires <= now + MAX_LIFETIME_SECONDS
            and member.issued <= now + MAX_AHEAD_SECONDS
            and bucket_of(member.peer_id, place[0]) == place[1]
            and _is_genuine(member)
        )


@lru_cache(maxsize=1024)
def _read(value: bytes) -> Member | None:
    """Return the member in a stored value, whoever wrote it; None if the value is invalid.

    The result is cached, because the same record arrives many times.
    """
    try:
        sealed: bytes = _STORED.decode(value)
        return read_member(sealed)
    except BadRecord as error:
        log.debug("membership record ignored: %s", error)
        return None


_is_genuine = lru_cache(maxsize=1024)(is_genuine)


class Membership:
    """Our node of the DHT, on a running daemon."""

    def __init__(
        self,
        p2p: Any,
        node: Any,
        peer_id: str,
    ) -> None:
        self._p2p = p2p
        self._node = node
        self._peer_id = peer_id
        self._depth = 0
        self._num_found = 0  # members in the last read
        self._has_place = False  # whether our record lies in the bucket at `_depth`
        self._turns = Counter[str]()

    @classmethod
    async def start(cls, daemon: Daemon, timeout_seconds: float) -> "Membership":
        """Start the DHT node, without peers yet. Raises SwarmError."""
        p2p = None
        try:
            async with asyncio.timeout(timeout_seconds):
                p2p = await P2P.replicate(Multiaddr(daemon.control))
                node = await DHTNode.create(
                    p2p=p2p,
                    node_id=dht_guard.place_of(daemon.peer_id),
                    wait_timeout=RPC_TIMEOUT_SECONDS,
                    parallel_rpc=32,
                    num_replicas=NUM_REPLICAS,
                    record_validator=_MemberValidator(),
                    # Records are read to find new ones, which caches would only delay.
                    cache_locally=False,
                    cache_nearest=0,
                    cache_on_store=False,
                    cache_refresh_before_expiry=0,
                    reuse_get_requests=False,
                )
        except (TimeoutError, OSError, EOFError) as error:
            if p2p is not None:
                await p2p.shutdown()
            raise SwarmError(
                f"DHT node can't start on the libp2p daemon: {error or 'no answer in time'}"
            ) from error
        node.protocol.storage, node.protocol.cache = _BoundedStorage(), _BoundedStorage()
        return cls(p2p, node, daemon.peer_id)

    async def close(self) -> None:
        """Stop our node. The end of the daemon removes its handlers."""
        self._node.is_alive = False
        await self._p2p.shutdown()

    @property
    def reader(self) -> "asyncio.Task[None]":
        """Return the task that reads the daemon's messages, which must never end.

        An answer that arrives just after its request was abandoned ends hivemind's task silently,
        and the DHT receives nothing from then on.
        """
        task: asyncio.Task[None] = self._p2p._client.control._read_task
        return task

    @property
    def num_neighbours(self) -> int:
        """Return the number of known DHT nodes; with 0 no record can be stored or found."""
        return len(self._node.protocol.routing_table.peer_id_to_uid)

    async def meet(self, peer_id: str) -> bool:
        """Make a connected peer a neighbour. Return False if it does not answer as a DHT node."""
        return await self._node.protocol.call_ping(PeerID.from_base58(peer_id)) is not None

    async def look_around(self) -> None:
        """Fill the routing table with the nodes near ours."""
        if self._is_thorough("look", self.num_neighbours >= ENOUGH_NEIGHBOURS):
            async with asyncio.timeout(READ_TIMEOUT_SECONDS):
                await self._node.find_nearest_nodes([self._node.node_id])

    async def announce(self, member: Member) -> None:
        """Store our record in the first bucket on our path that has room. Raises TimeoutError."""
        async with asyncio.timeout(READ_TIMEOUT_SECONDS):
            if not self._is_thorough("announce", self._has_place) and await self._store(
                self._depth, member
            ):
                return
            self._has_place = False
            for depth in range(max(0, self._depth - 1), MAX_DEPTH):
                held = await self._read(depth, bucket_of(member.peer_id, depth), thorough=True)
                is_ours = any(m.peer_id == member.peer_id for m in held)
                if len(held) >= BUCKET_SIZE and depth + 1 < MAX_DEPTH and not is_ours:
                    continue
                self._has_place = await self._store(depth, member)
                self._depth = depth
                return

    async def read(
        self,
        rng: random.Random,
    ) -> list[Member]:
        """Return members from the buckets on a random path, down to the deepest one in use.

        Raises TimeoutError. The DHT leaves out expired records, if the clocks agree.
        """
        found: list[Member] = []
        start = max(0, self._depth - 1)
        thorough = self._is_thorough("read", self._num_found >= ENOUGH_FOUND)
        async with asyncio.timeout(READ_TIMEOUT_SECONDS):
            for depth in range(start, MAX_DEPTH):
                members = await self._read(depth, rng.randrange(FAN_OUT**depth), thorough)
                found += members
                if len(members) < BUCKET_SIZE and depth >= self._depth:
                    break
        self._num_found = len(found)
        return found

    def _is_thorough(self, what: str, is_well: bool) -> bool:
        """Return whether the action `what` is due to query all replicas (THOROUGH_EVERY)."""
        self._turns[what] = self._turns[what] + 1 if is_well else 0
        return self._turns[what] % THOROUGH_EVERY == 0

    async def _read(
        self,
        depth: int,
        bucket: int,
        thorough: bool,
    ) -> list[Member]:
        """Return the members of a bucket: from all its replicas, or from the first that answers."""
        workers = self._node.num_workers if thorough else 1
        result = await self._node.get(
            _key(depth, bucket), latest=thorough, beam_size=BEAM_SIZE, num_workers=workers
        )
        if result is None or not isinstance(result.value, dict):
            return []
        members = (_read(msgpack.packb(entry.value)) for entry in result.value.values())
        return [m for m in members if m is not None and _is_genuine(m)]

    async def _store(self, depth: int, member: Member) -> bool:
        """Put a record into its bucket; return whether any replica stored it.

        hivemind's own `store` looks the key up, and so receives all replicas of its value. A lookup
        of an adjacent key finds the same nodes without receiving any value.
        """
        key = DHTID.generate(_key(depth, bucket_of(member.peer_id, depth)))
        adjacent = DHTID(int(key) ^ 1)
        found = await self._node.find_nearest_nodes(
            [adjacent], k_nearest=BEAM_SIZE, beam_size=BEAM_SIZE
        )
        nearest, answers = list(found[adjacent].values()), list[bool]()
        while nearest and len(answers) < NUM_REPLICAS:
            missing = NUM_REPLICAS - len(answers)
            batch, nearest = nearest[:missing], nearest[missing:]
            stores = [self._store_at(peer, key, member) for peer in batch]
            stored = await asyncio.gather(*stores)
            answers += [answer for answer in stored if answer is not None]
        return any(answers)

    async def _store_at(
        self,
        peer: Any,
        key: DHTID,
        member: Member,
    ) -> bool | None:
        """Return whether a node stored the record; it does not if it has a newer one or no room.

        None: it does not answer.
        """
        protocol, value = self._node.protocol, msgpack.packb(member.sealed)
        expires = float(member.expires)
        if peer == self._node.peer_id:
            return bool(protocol.storage.store(key, value, expires, subkey=member.peer_id))
        stored = await protocol.call_store(peer, [key], [value], expires, subkeys=[member.peer_id])
        return bool(stored[0]) if stored else None
