"""The DHT with untrusted peers in it."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import wraps
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from worker import settings
from worker.swarm import identity
from worker.swarm.discovery import dht, dht_guard
from worker.swarm.discovery.dht import Membership, bucket_of
from worker.swarm.protocol import messages
from worker.swarm.transport.daemon import Daemon


class Node:
    """A daemon and its DHT node."""

    def __init__(self, me: identity.Identity, daemon: Daemon, membership: Membership) -> None:
        self.me, self.daemon, self.membership = me, daemon, membership

    def record(
        self, who: identity.Identity | None = None, life: int = 60, issued_in: int = 0
    ) -> messages.Member:
        now = int(time.time()) + issued_in
        return messages.seal_member(who or self.me, self.daemon.addresses, 0, now, now + life, ())

    async def names(self, seed: int = 1) -> set[str]:
        return {m.peer_id for m in await self.membership.read(random.Random(seed))}


def run(tmp_path: Path, count: int, scenario: Callable[[list[Node]], Awaitable[None]]) -> None:
    """`scenario` with `count` nodes that all know the first one."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            nodes: list[Node] = []
            for i in range(count):
                me = identity.create(tmp_path / f"key{i}")
                daemon = await Daemon.start(
                    tmp_path / f"key{i}", settings.Swarm(host="127.0.0.1"), 0
                )
                stack.push_async_callback(daemon.stop)
                membership = await Membership.start(daemon, 30)
                stack.push_async_callback(membership.close)
                nodes.append(Node(me, daemon, membership))
            for node in nodes[1:]:
                await node.daemon.connect(nodes[0].me.peer_id, nodes[0].daemon.addresses, 5)
                assert await node.membership.meet(nodes[0].me.peer_id)
                await node.membership.look_around()
            async with asyncio.timeout(60):
                await scenario(nodes)

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(main())


def stub(sender: Node, target: Node) -> Any:
    """Return the stub through which an untrusted peer sends requests to the target."""
    return sender.membership._node.protocol.get_stub(PeerID.from_base58(target.me.peer_id))


def store_request(
    sender: Node, key: str, subkey: bytes, value: bytes, expires: float
) -> dht_pb2.StoreRequest:
    return dht_pb2.StoreRequest(
        keys=[DHTID.generate(key).to_bytes()],
        subkeys=[subkey],
        values=[value],
        expiration_time=[expires],
        in_cache=[False],
        peer=sender.membership._node.protocol.node_info,
    )


async def store(
    sender: Node, target: Node, key: str, subkey: bytes, value: bytes, expires: float
) -> bool:
    """Send a raw store request, as an untrusted peer could; False also without an answer."""
    request = store_request(sender, key, subkey, value, expires)
    try:
        response: Any = await stub(sender, target).rpc_store(request, timeout=3)
    except Exception:  # noqa: BLE001 - only the effect on the target matters
        return False
    return bool(response.store_ok[0])


def test_members_are_found_through_the_dht_alone(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node]) -> None:
        for node in nodes[1:]:
            await node.membership.announce(node.record())
        for node in nodes:
            assert await node.names() == {n.me.peer_id for n in nodes[1:]}

    run(tmp_path, 4, scenario)


def test_full_bucket_sends_members_one_level_deeper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dht, "BUCKET_SIZE", 4)
    members = list[identity.Identity]()
    crowd = Counter[int]()
    while len(members) < 16:
        member = identity.create(tmp_path / f"member{crowd.total()}")
        crowd[bucket_of(member.peer_id, 1)] += 1
        if crowd[bucket_of(member.peer_id, 1)] <= 4:  # so that the second level has room for all
            members.append(member)

    async def scenario(nodes: list[Node]) -> None:
        for i, member in enumerate(members):
            announcer = nodes[i % 2].membership
            announcer._depth, announcer._has_place = 0, False
            await announcer.announce(nodes[0].record(member))
        top = await nodes[0].membership._read(0, 0, True)
        assert {m.peer_id for m in top} == {m.peer_id for m in members[:4]}
        for depth, bucket in ((1, b) for b in range(dht.FAN_OUT)):
            for member in await nodes[0].membership._read(depth, bucket, True):
                assert bucket_of(member.peer_id, depth) == bucket
        assert nodes[1].membership._depth >= 1
        nodes[1].membership._depth = 1
        found = set().union(*[await nodes[1].names(seed) for seed in range(160)])
        assert found == {m.peer_id for m in members}

    run(tmp_path, 2, scenario)


def test_node_that_has_its_place_and_knows_many_reads_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dht, "ENOUGH_FOUND", 3)
    reads = []
    read = Membership._read

    async def note(
        self: Membership, depth: int, bucket: int, thorough: bool
    ) -> list[messages.Member]:
        reads.append(thorough)
        return await read(self, depth, bucket, thorough)

    monkeypatch.setattr(Membership, "_read", note)

    async def scenario(nodes: list[Node]) -> None:
        everybody = {n.me.peer_id for n in nodes}
        for node in nodes:
            await node.membership.announce(node.record())
        assert reads == [True] * len(nodes)
        reads.clear()
        node, member = nodes[1], nodes[1].record(life=61)
        await node.membership.announce(member)
        assert reads == []
        for _ in range(dht.THOROUGH_EVERY + 1):
            assert await node.names() == everybody
        assert reads == [True] + [False] * (dht.THOROUGH_EVERY - 1) + [True]
        found = await nodes[2].membership._read(0, 0, True)
        assert {m.expires for m in found if m.peer_id == member.peer_id} == {member.expires}

        for holder in nodes:  # its place is lost: it is told, and looks for one again
            monkeypatch.setattr(holder.membership._node.protocol, "storage", dht._BoundedStorage())
        monkeypatch.setattr(dht, "BUCKET_HARD_LIMIT", 1)
        await nodes[0].membership.announce(nodes[0].record(life=62))
        await node.membership.announce(node.record(life=62))
        assert not node.membership._has_place

    run(tmp_path, 4, scenario)


def test_only_genuine_records_are_stored(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node]) -> None:
        good, liar = nodes
        record, top = liar.record(), dht._key(0, 0)
        value, subkey = msgpack.packb(record.sealed), msgpack.packb(record.peer_id)
        bad = bytearray(value)
        bad[-1] ^= 1
        lasting, early = liar.record(life=2 * 3600), liar.record(issued_in=1800)
        wrong_bucket = dht._key(1, (bucket_of(record.peer_id, 1) + 1) % dht.FAN_OUT)
        expires = float(record.expires)
        cases = {
            "forged": (top, subkey, bytes(bad), expires),
            "other subkey": (top, msgpack.packb(good.me.peer_id), value, expires),
            "other expiry": (top, subkey, value, expires + 600),
            "for hours": (top, subkey, msgpack.packb(lasting.sealed), float(lasting.expires)),
            "from the future": (top, subkey, msgpack.packb(early.sealed), float(early.expires)),
            "other bucket": (wrong_bucket, subkey, value, expires),
            "other key": ("somebody else's", subkey, value, expires),
            "no subkey": (top, MSGPackSerializer.dumps(None), value, expires),
        }
        for name, case in cases.items():
            assert not await store(liar, good, *case), name
        assert len(good.membership._node.protocol.storage) == 0
        assert await store(liar, good, top, subkey, value, expires)
        assert await good.names() == {record.peer_id}

    run(tmp_path, 2, scenario)


def test_value_that_nests_extensions_does_not_end_the_process(tmp_path: Path) -> None:
    """The decoder in hivemind recurses for each level: 12 KB overflow the stack."""
    nested = msgpack.packb(1)
    for _ in range(3000):
        nested = msgpack.packb(msgpack.ExtType(0x40, nested))

    async def scenario(nodes: list[Node]) -> None:
        good, liar = nodes
        top, expires = dht._key(0, 0), time.time() + 60
        assert not await store(liar, good, top, b"", nested, expires)  # as a whole dictionary
        assert not await store(liar, good, top, nested, b"\xc4\x00", expires)  # as a subkey
        record = liar.record()
        await liar.membership.announce(record)
        assert await good.names() == {record.peer_id}

    run(tmp_path, 2, scenario)


@pytest.mark.parametrize("num_bytes", [1 << 20, 3_900_000])
def test_large_value_arrives_and_is_refused(tmp_path: Path, num_bytes: int) -> None:
    """More than 4 MB is refused by the sender's own hivemind."""

    async def scenario(nodes: list[Node]) -> None:
        good, liar = nodes
        request = store_request(liar, dht._key(0, 0), b"", bytes(num_bytes), time.time() + 60)
        with pytest.raises(
            P2PHandlerError, match=f"{num_bytes} bytes to store; at most 262144 are accepted"
        ):
            await stub(liar, good).rpc_store(request, timeout=10)
        assert len(good.membership._node.protocol.storage) == 0
        await liar.membership.announce(liar.record())
        assert await good.names() == {liar.me.peer_id}

    run(tmp_path, 2, scenario)


def test_no_signature_is_verified_of_a_record_that_is_refused_anyhow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = []
    monkeypatch.setattr(messages, "verify", lambda peer_id, *_: verified.append(peer_id))

    async def scenario(nodes: list[Node]) -> None:
        good, liar = nodes
        record = liar.record(life=61)
        value, subkey, expires = (
            msgpack.packb(record.sealed),
            msgpack.packb(record.peer_id),
            float(record.expires),
        )
        wrong_bucket = dht._key(1, (bucket_of(record.peer_id, 1) + 1) % dht.FAN_OUT)
        await store(liar, good, dht._key(0, 0), msgpack.packb(good.me.peer_id), value, expires)
        await store(liar, good, dht._key(0, 0), subkey, value, expires + 1)
        await store(liar, good, wrong_bucket, subkey, value, expires)
        assert verified == []
        await store(liar, good, dht._key(0, 0), subkey, value, expires)
        assert verified == [liar.me.peer_id]

    run(tmp_path, 2, scenario)


def test_peer_that_stores_all_the_time_is_limited(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node]) -> None:
        good, flooder = nodes
        request = store_request(
            flooder, "somebody else's", msgpack.packb("x"), b"", time.time() + 60
        )
        for _ in range(dht_guard.MAX_STORES_PER_PEER):
            assert list((await stub(flooder, good).rpc_store(request, timeout=3)).store_ok) == [
                False
            ]
        with pytest.raises(P2PHandlerError, match="more than 40 requests in 10 s"):
            await stub(flooder, good).rpc_store(request, timeout=3)
        assert await flooder.membership.meet(good.me.peer_id)

    run(tmp_path, 2, scenario)


Answer = Callable[[Any], None]
EMPTY = dht._FlatSerializer.dumps(dht.DictionaryDHTValue())


def lie_of_neighbours(num_names: int, num_bytes: int) -> Answer:
    def lie(response: Any) -> None:
        for result in response.results:
            result.nearest_node_ids.extend([b"\1" * 20] * num_names)
            result.nearest_peer_ids.extend([b"\x12" + b"\7" * num_bytes] * num_names)

    return lie


def lie_of_place(response: Any) -> None:
    response.peer.node_id = b"\7" * 100_000


def lie_of_eternity(response: Any) -> None:
    for result in response.results:
        result.type, result.value, result.expiration_time = (
            dht_pb2.FOUND_DICTIONARY,
            EMPTY,
            float("inf"),
        )


def lie_of_bomb(response: Any) -> None:
    """8 MiB in a decompressed message of groups; here what one answer has room for."""
    inner = b"\xdc\x00\x10" + b"\x90" * 16
    for _ in range(3):
        inner = b"\xdc\x00\x10" + inner * 16
    for result in response.results:
        result.type, result.value, result.expiration_time = (
            dht_pb2.FOUND_DICTIONARY,
            b"\x9f" + inner * 15,
            1e10,
        )


@pytest.mark.parametrize(
    "lie",
    [
        lie_of_neighbours(1, 60_000),
        lie_of_neighbours(30_000, 33),
        lie_of_place,
        lie_of_eternity,
        lie_of_bomb,
    ],
    ids=["long-name", "many-names", "place", "for-ever", "bomb"],
)
def test_answer_of_a_lying_neighbour_costs_nothing_and_the_others_are_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: Answer
) -> None:
    """A name of 60 KB takes 5 s in base 58."""
    liars = set[object]()
    for name in ("rpc_find", "rpc_ping"):
        monkeypatch.setattr(
            DHTProtocol, name, answered_by_liars(getattr(DHTProtocol, name), liars, lie)
        )
    found, longest = list[set[str]](), [0.0]

    async def note_pauses() -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            longest[0], last = max(longest[0], time.monotonic() - last), time.monotonic()

    async def scenario(nodes: list[Node]) -> None:
        good, liar, other = nodes
        await other.membership.announce(other.record())
        for node in (good, other):
            await node.membership.meet(liar.me.peer_id)
        liars.add(liar.membership._node.protocol)
        noting = asyncio.create_task(note_pauses())
        for seed in range(3):
            found.append(await good.names(seed))
        await good.membership.meet(liar.me.peer_id)
        await asyncio.sleep(0.05)
        noting.cancel()

    run(tmp_path, 3, scenario)
    assert found == [found[0]] * 3
    assert len(found[0]) == 1
    assert longest[0] < 0.5


def answered_by_liars(
    answer: Callable[..., Awaitable[Any]], liars: set[object], lie: Answer
) -> Any:
    @wraps(answer)  # hivemind reads its types
    async def lying(protocol: Any, request: Any, context: Any) -> Any:
        response = await answer(protocol, request, context)
        if protocol in liars:
            lie(response)
        return response

    return lying


def test_peers_that_want_to_be_pinged_back_stop_no_call_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinged = []
    call_ping = DHTProtocol.call_ping

    async def note(protocol: Any, *arguments: Any, **options: Any) -> Any:
        pinged.append(protocol)
        return await call_ping(protocol, *arguments, **options)

    async def scenario(nodes: list[Node]) -> None:
        good, outsider = nodes
        monkeypatch.setattr(DHTProtocol, "call_ping", note)
        request = dht_pb2.PingRequest(
            peer=outsider.membership._node.protocol.node_info, validate=True
        )
        response = await stub(outsider, good).rpc_ping(request, timeout=3)
        assert pinged == []
        assert response.available  # or a node of hivemind's own would not join through us

    run(tmp_path, 2, scenario)


def test_request_for_many_keys_is_refused_before_any_is_looked_up(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node]) -> None:
        good, liar = nodes
        await liar.membership.announce(liar.record())
        keys = [DHTID.generate().to_bytes() for _ in range(1000)] * 150
        request = dht_pb2.FindRequest(keys=keys, peer=liar.membership._node.protocol.node_info)
        with pytest.raises(
            P2PHandlerError, match="request with 150000 keys; at most 64 are accepted"
        ):
            await stub(liar, good).rpc_find(request, timeout=30)
        assert await good.names() == {liar.me.peer_id}

    run(tmp_path, 2, scenario)


def test_peer_that_asks_all_the_time_is_limited_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dht_guard, "MAX_REQUESTS_PER_PEER", 30)

    async def scenario(nodes: list[Node]) -> None:
        good, flooder, other = nodes
        me = PeerID.from_base58(good.me.peer_id)
        answers = [await flooder.membership._node.protocol.call_ping(me) for _ in range(60)]
        assert answers[:20] == [dht_guard.place_of(good.me.peer_id)] * 20
        assert answers[-20:] == [None] * 20
        assert caplog.text.count(f"DHT request refused peer={flooder.me.peer_id} reason=flood") == 1
        assert await other.membership._node.protocol.call_ping(me) is not None

    run(tmp_path, 3, scenario)


def test_peer_that_claims_places_in_the_dht_is_nobodys_neighbour(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node]) -> None:
        good, liar, other = nodes
        protocol, table = (
            liar.membership._node.protocol,
            good.membership._node.protocol.routing_table,
        )
        before = dict(table.uid_to_peer_id)
        assert len(before) == 2
        for claim in (b"", b"short", b"x" * 20, *(DHTID.generate().to_bytes() for _ in range(30))):
            protocol.node_info.node_id = claim
            for peer in (good, other):
                await protocol.call_ping(PeerID.from_base58(peer.me.peer_id))
        await asyncio.sleep(0.2)
        assert table.uid_to_peer_id == before
        await good.membership.announce(good.record())
        assert await other.names() == {good.me.peer_id}

    run(tmp_path, 3, scenario)


def test_bucket_has_a_hard_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht, "BUCKET_HARD_LIMIT", 5)

    async def scenario(nodes: list[Node]) -> None:
        good, liar = nodes
        accepted = []
        for i in range(8):
            record = liar.record(identity.create(tmp_path / f"sybil{i}"))
            value, subkey = msgpack.packb(record.sealed), msgpack.packb(record.peer_id)
            accepted.append(
                await store(liar, good, dht._key(0, 0), subkey, value, float(record.expires))
            )
        assert accepted == [True] * 5 + [False] * 3

    run(tmp_path, 2, scenario)


def test_dead_daemon_is_noticed_and_the_reason_kept(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node]) -> None:
        nodes[0].daemon._process.kill()
        async with asyncio.timeout(5):
            await nodes[0].daemon.died.wait()
        assert "libp2p daemon ended with -9" in nodes[0].daemon.death_notice

    run(tmp_path, 1, scenario)
