"""What a hostile peer may answer to a request for groups."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cache

import msgpack
import zstandard
from swarm_lab import make_groups

from worker.records import Group
from worker.swarm.identity import Identity
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Ask, Kind
from worker.swarm.transport.streams import Stream

Lie = Callable[[Identity, Ask, Stream], Awaitable[None]]


def send_groups(change: Callable[[list[Group], str, int], list[Group]]) -> Lie:
    async def lie(me: Identity, ask: Ask, stream: Stream) -> None:
        groups = change(make_groups(me.peer_id, ask.round), me.peer_id, ask.round)
        await stream.send(
            messages.encode_frame(Kind.GROUPS, messages.seal_groups(me, ask.round, groups))
        )

    return lie


def change_task(**changes: object) -> Lie:
    return send_groups(
        lambda groups, _, __: [replace(g, task=replace(g.task, **changes)) for g in groups]
    )  # type: ignore[arg-type]


def seal(me: Identity, body: bytes) -> bytes:
    return msgpack.packb([me.public_key, me.sign(b"hivewright/groups/3\n" + body), body])


async def lie_with_signature(me: Identity, ask: Ask, stream: Stream) -> None:
    sealed = bytearray(messages.seal_groups(me, ask.round, make_groups(me.peer_id, ask.round)))
    sealed[-1] ^= 1
    await stream.send(messages.encode_frame(Kind.GROUPS, bytes(sealed)))


@cache
def make_bomb() -> bytes:
    return zstandard.compress(bytes(300 << 20))


async def lie_with_bomb(me: Identity, ask: Ask, stream: Stream) -> None:
    await stream.send(messages.encode_frame(Kind.GROUPS, seal(me, make_bomb())))


@cache
def make_bomb_of_objects() -> bytes:
    """8 MiB of empty lists in lists."""
    thousand = b"\xdc\x04\x00" + b"\x90" * 1024
    million = b"\xdc\x04\x00" + thousand * 1024
    return zstandard.compress(b"\x97" + million * 7)


async def lie_with_bomb_of_objects(me: Identity, ask: Ask, stream: Stream) -> None:
    await stream.send(messages.encode_frame(Kind.GROUPS, seal(me, make_bomb_of_objects())))


async def lie_with_replay(me: Identity, ask: Ask, stream: Stream) -> None:
    old = messages.seal_groups(me, ask.round - 1, make_groups(me.peer_id, ask.round - 1))
    await stream.send(messages.encode_frame(Kind.GROUPS, old))


async def lie_with_size(me: Identity, ask: Ask, stream: Stream) -> None:
    await stream.send(messages.encode_frame(Kind.GROUPS, bytes(10 << 20)))


async def lie_with_garbage(me: Identity, ask: Ask, stream: Stream) -> None:
    await stream.send(b"GET / HTTP/1.1\r\n\r\n")


async def lie_with_wrong_kind(me: Identity, ask: Ask, stream: Stream) -> None:
    await stream.send(messages.encode_peers([]))


async def lie_with_newer_version(me: Identity, ask: Ask, stream: Stream) -> None:
    frame = bytearray(messages.encode_frame(Kind.GROUPS, b""))
    frame[2] = messages.VERSION + 1
    await stream.send(bytes(frame))


async def lie_with_waits(me: Identity, ask: Ask, stream: Stream) -> None:
    await stream.send(messages.encode_frame(Kind.WAIT, b"") * 1000)
    await asyncio.sleep(5)


async def end_in_the_middle(me: Identity, ask: Ask, stream: Stream) -> None:
    header = messages.encode_frame(Kind.GROUPS, b"")[:4] + (1000).to_bytes(4, "big")
    await stream.send(header + b"x" * 500)


async def say_nothing(me: Identity, ask: Ask, stream: Stream) -> None:
    await asyncio.sleep(20)


async def promise(me: Identity, ask: Ask, stream: Stream) -> None:
    await stream.send(messages.encode_frame(Kind.WAIT, b""))
    await asyncio.sleep(20)


async def trickle(me: Identity, ask: Ask, stream: Stream) -> None:
    groups = messages.seal_groups(me, ask.round, make_groups(me.peer_id, ask.round))
    await stream.send(messages.encode_frame(Kind.WAIT, b""))
    for byte in messages.encode_frame(Kind.GROUPS, groups):
        await stream.send(bytes([byte]))
        await asyncio.sleep(0.1)


LIES = {
    "seed": change_task(seed=5),
    "index": send_groups(
        lambda groups, _, __: [replace(groups[0], task=replace(groups[0].task, index=10**6))]
    ),
    "num-completions": send_groups(
        lambda groups, _, __: [replace(g, completions=("one",)) for g in groups]
    ),
    "too-long": send_groups(
        lambda groups, _, __: [replace(g, completions=("x" * 20_000, "y")) for g in groups]
    ),
    "too-large": send_groups(
        lambda groups, _, __: [replace(g, completions=("y",)) for g in groups] * 8
    ),
    "duplicate": send_groups(lambda groups, _, __: [groups[0]] * 5),
    "signature": lie_with_signature,
    "round": lie_with_replay,
    "malformed": lie_with_garbage,
    "version": lie_with_newer_version,
    "flood": lie_with_waits,
}
