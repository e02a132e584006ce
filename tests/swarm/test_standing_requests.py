"""A node that does not wait: it asks on while it works, and takes what has come."""

import asyncio
import time

from lies import Lie, send_groups
from swarm_lab import Lab, TheseFirst, make_groups, wait_until

from worker.records import Collected, Place
from worker.swarm.identity import Identity
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Ask, Kind
from worker.swarm.swarm import Swarm
from worker.swarm.transport.streams import Stream


def name_of(swarm: Swarm) -> str:
    return swarm.status().peer_id


def publish(swarm: Swarm, round: int, part: int = 0) -> None:
    swarm.publish(round, make_groups(name_of(swarm), round, part=part), part)


def ask_and_take(swarm: Swarm, round: int, seconds: float = 10.0) -> Collected:
    """Return what comes; nothing if nothing comes for so long."""
    swarm.ask(round, 9)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (collected := swarm.take(round)).groups:
            return collected
        time.sleep(0.05)
    return Collected()


def pair(lab: Lab) -> tuple[Swarm, Swarm]:
    lab.bootnode()
    fast, slow = lab.peer("fast"), lab.peer("slow")
    wait_until(lambda: fast.status().peers_known == 1, 20, "they know each other")
    return fast, slow


def test_slow_peer_two_rounds_behind_still_teaches_once_and_is_not_blamed(lab: Lab) -> None:
    fast, slow = pair(lab)
    publish(slow, 5)
    collected = ask_and_take(fast, 7)
    assert len(collected.groups) == 9
    assert (collected.behind, collected.rejected) == ({2: 9}, {})
    assert ask_and_take(fast, 7, seconds=2.0).groups == ()
    publish(slow, 7)
    assert ask_and_take(fast, 7).behind == {0: 9}
    assert not fast._context.peers._conduct
    assert fast.status().state == "connected"


def test_groups_that_are_too_old_are_not_taken(lab: Lab) -> None:
    fast, slow = pair(lab)
    publish(slow, 4)
    assert ask_and_take(fast, 7, seconds=2.0) == Collected()
    assert fast.status().rejected == {}


def test_each_part_of_a_peer_is_taken_once_and_the_newest_first(lab: Lab) -> None:
    one, other = pair(lab)
    publish(other, 3)
    for part in (1, 2):
        publish(other, 3, part)
    assert [g.task.index for g in ask_and_take(one, 3).groups] == list(range(512, 521))
    assert ask_and_take(one, 3, seconds=2.0).groups == ()
    publish(other, 3, part=3)
    assert [g.task.index for g in ask_and_take(one, 3).groups] == list(range(768, 777))
    assert sorted(other._serving._ours) == [(3, 0), (3, 3)]  # the newest part, and the first


def test_request_that_stands_is_answered_by_the_next_round(lab: Lab) -> None:
    one, other = pair(lab)
    publish(other, 3)
    assert ask_and_take(one, 3).groups
    one.ask(3, 9)
    wait_until(lambda: len(other._serving._asking) == 1, 10, "its request stands")
    assert one.take(3).groups == ()
    publish(other, 4)
    wait_until(lambda: len(one.take(4).groups) == 9, 10, "the groups of the next round came")


def trio(lab: Lab, lie: Lie, seconds: float) -> tuple[Swarm, Swarm]:
    """Return a node that asks one peer at a time, and a peer that is ready.

    A third one, which is asked first, answers with `lie`.
    """

    async def on_ask(peer_id: str, ask: Ask, stream: Stream) -> None:
        await lie(slow.context.identity, ask, stream)

    lab.bootnode()
    one = lab.peer("one", peers_per_round=1, collect_timeout_seconds=seconds)
    ready, slow = lab.peer("ready"), lab.network("slow", on_ask=on_ask)
    peers = one._context.peers
    wait_until(lambda: len(peers.known()) == 2, 20, "all are known")
    wait_until(lambda: not any(map(peers.num_failures, peers.known())), 20, "none failed")
    rng = one._context.rng = TheseFirst(1)
    rng.first = frozenset({slow.context.identity.peer_id})
    publish(ready, 1)
    return one, ready


async def say_wait(me: Identity, ask: Ask, stream: Stream) -> None:
    await stream.send(messages.encode_frame(Kind.WAIT, b""))
    await stream.wait_closed()


def test_request_to_a_peer_that_is_not_ready_takes_the_place_of_no_other(lab: Lab) -> None:
    one, ready = trio(lab, say_wait, seconds=120.0)
    assert {g.peer_id for g in ask_and_take(one, 1).groups} == {name_of(ready)}


async def send_slowly(me: Identity, ask: Ask, stream: Stream) -> None:
    groups = messages.seal_groups(me, ask.round, make_groups(me.peer_id, ask.round))
    for byte in messages.encode_frame(Kind.GROUPS, groups):
        await stream.send(bytes([byte]))
        await asyncio.sleep(0.1)


def test_peer_that_sends_slowly_is_replaced_however_short_the_parts_are(lab: Lab) -> None:
    one, ready = trio(lab, send_slowly, seconds=3.0)

    def has_come() -> bool:
        one.ask(1, 9)
        return {g.peer_id for g in one.take(1).groups} == {name_of(ready)}

    wait_until(has_come, 10, "the groups of the peer that is ready came")


def test_taking_does_not_wait_for_anybody(lab: Lab) -> None:
    one, _ = pair(lab)
    one.ask(1, 9)
    wait_until(lambda: bool(one.take(1).heard), 10, "the other one has said that we shall wait")
    started = time.monotonic()
    assert one.take(1).groups == ()
    assert time.monotonic() - started < 1
    assert one.status().state == "connected"


def test_peer_that_becomes_known_is_asked_and_one_that_is_gone_is_noticed(lab: Lab) -> None:
    lab.bootnode()
    one = lab.peer("one")
    one.ask(1, 9)
    wait_until(lambda: not one.take(1).heard and one.status().state == "training-alone", 10, "")
    other = lab.peer("other")
    publish(other, 1)
    wait_until(lambda: len(one.take(1).groups) == 9, 20, "its groups came")
    assert one.status().state == "connected"
    other.close()

    def is_alone() -> bool:
        one.ask(2, 9)
        time.sleep(0.5)
        return not one.take(2).groups and one.status().state == "training-alone"

    wait_until(is_alone, 20, "it is gone")


def test_replayed_groups_are_refused_when_newer_ones_were_asked_for(lab: Lab) -> None:
    async def replay(me: Identity, ask: Ask, stream: Stream) -> None:
        sealed = messages.seal_groups(me, 5, make_groups(me.peer_id, 5))
        await stream.send(messages.encode_frame(Kind.GROUPS, sealed))

    async def on_ask(peer_id: str, ask: Ask, stream: Stream) -> None:
        await replay(liar.context.identity, ask, stream)

    lab.bootnode()
    asker = lab.peer("asker")
    liar = lab.network("liar", on_ask=on_ask)
    wait_until(lambda: asker.status().peers_known == 1, 20, "it is known")
    assert len(ask_and_take(asker, 5).groups) == 9
    assert asker._used[liar.context.identity.peer_id] == Place(5, 0)
    asker.ask(5, 9)
    wait_until(lambda: asker.status().rejected == {"round": 1}, 10, "the same ones are refused")
    assert asker.take(5).groups == ()


def test_round_far_ahead_is_not_taken(lab: Lab) -> None:
    async def on_ask(peer_id: str, ask: Ask, stream: Stream) -> None:
        ahead = Ask(ask.round + 1, ask.oldest, ask.patience, ask.member)
        await send_groups(lambda groups, _, __: groups)(liar.context.identity, ahead, stream)

    lab.bootnode()
    asker = lab.peer("asker")
    liar = lab.network("liar", on_ask=on_ask)
    wait_until(lambda: asker.status().peers_known == 1, 20, "it is known")
    asker.ask(5, 9)
    wait_until(lambda: asker.status().rejected == {"round": 1}, 10, "they are refused")
