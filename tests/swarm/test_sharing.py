"""A peer that many ask, that is gone or excluded: groups come from others, or not at all."""

import asyncio
import logging
import threading
import time
from pathlib import Path

import pytest
from swarm_lab import Lab, encode_ask, make_groups, wait_until

from worker.records import Place
from worker.swarm import identity
from worker.swarm.network import Network
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Ask, Kind
from worker.swarm.swarm import Swarm
from worker.swarm.transport.streams import Stream


def name_of(swarm: Swarm) -> str:
    return swarm.status().peer_id


def meet(*swarms: Swarm) -> None:
    wait_until(
        lambda: all(s.status().peers_known == len(swarms) - 1 for s in swarms), 20, "all know all"
    )


def make_full(lab: Lab, owner: Swarm) -> None:
    """Keep a request for a future round open: the owner serves one at a time."""
    network = lab.network("patient", environments=("sums 1",))
    tasks: list[object] = network.__dict__.setdefault("tasks", [])  # nobody else refers to them

    async def ask() -> None:
        async with network.connections.stream(name_of(owner), owner._context.addresses) as stream:
            await stream.send(encode_ask(9, 60, network.context.member().sealed))
            await stream.receive(100)
            await stream.wait_closed()

    network.post(lambda: tasks.append(network._thread._loop.create_task(ask())))  # type: ignore[union-attr]
    wait_until(lambda: len(owner._serving._asking) == 1, 10, "the owner is full")


def test_full_peer_names_a_holder_and_its_groups_come_from_there(lab: Lab) -> None:
    lab.bootnode()
    owner, first, second = lab.peer("owner", max_askers=1), lab.peer("first"), lab.peer("second")
    meet(owner, first, second)
    owner.publish(1, make_groups(name_of(owner), 1))
    first.publish(1, [])
    assert len(first.collect(1, 9).groups) == 9

    make_full(lab, owner)
    collected = second.collect(1, 9)
    assert {g.peer_id for g in collected.groups} == {name_of(owner)}
    assert len(collected.groups) == 9
    assert owner.status().requests_refused == {"elsewhere": 1}
    assert first.status().groups_handed_on == 1


def test_of_the_holders_that_a_full_peer_names_only_those_that_are_asked_are_learnt(
    lab: Lab, tmp_path: Path
) -> None:
    def make_up(number: int) -> bytes:
        me = identity.create(tmp_path / f"{number}.pem")
        now = int(time.time())
        return messages.seal_member(
            me, ["/ip4/127.0.0.1/tcp/9"], 1, now, now + 180, ["sums 1"]
        ).sealed

    async def on_ask(peer_id: str, ask: Ask, stream: Stream) -> None:
        await stream.send(
            messages.encode_frame(
                Kind.ELSEWHERE, messages.encode_peers(made_up)[messages.HEADER_BYTES :]
            )
        )

    made_up = [make_up(number) for number in range(messages.MAX_PEERS)]
    lab.bootnode()
    asker = lab.peer("asker")
    lab.network("liar", on_ask=on_ask)
    wait_until(lambda: asker.status().peers_known == 1, 20, "the liar is known")
    assert asker.collect(1, 9).groups == ()
    assert asker.status().peers_known == 1 + messages.MAX_HOLDERS


def test_full_peer_whose_groups_nobody_holds_says_so(lab: Lab) -> None:
    lab.bootnode()
    owner, asker = lab.peer("owner", max_askers=1), lab.peer("asker")
    meet(owner, asker)
    make_full(lab, owner)
    owner.publish(1, make_groups(name_of(owner), 1))
    collected = asker.collect(1, 9)
    assert (collected.groups, collected.heard) == ((), (name_of(owner),))
    assert owner.status().requests_refused == {"full": 1}


def ask_raw(outsider: Network, owner: Swarm, round: int) -> Kind | str:
    """Return the kind of the first frame, or the reason of the refusal."""

    async def ask() -> Kind | str:
        async with (
            outsider.connections.stream(name_of(owner), owner._context.addresses) as stream,
            asyncio.timeout(10),
        ):
            await stream.send(encode_ask(round, 0, outsider.context.member().sealed))
            try:
                return (await stream.receive(messages.MAX_FRAME_BYTES))[0]
            except messages.Refused as refusal:
                return refusal.reason

    return outsider.call(ask(), 15)


def test_greedy_peer_has_one_place_among_the_askers(lab: Lab) -> None:
    lab.bootnode()
    owner, asker = lab.peer("owner", max_askers=2), lab.peer("asker")
    meet(owner, asker)
    greedy = lab.network("greedy", environments=("sums 1",))
    ended: list[str] = []

    async def ask() -> None:
        async with greedy.connections.stream(name_of(owner), owner._context.addresses) as stream:
            await stream.send(encode_ask(9, 60, greedy.context.member().sealed))
            await stream.receive(100)
            await stream.wait_closed()
            ended.append("replaced")

    for _ in range(4):
        threading.Thread(target=lambda: greedy.call(ask(), 60), daemon=True).start()
    wait_until(lambda: len(ended) == 3, 10, "three of its four requests are ended by the others")
    owner.publish(1, make_groups(name_of(owner), 1))
    assert len(owner._serving._asking) == 1
    assert len(asker.collect(1, 9).groups) == 9


def test_round_far_ahead_is_no_reason_to_wait(lab: Lab) -> None:
    lab.bootnode()
    owner = lab.peer("owner")
    outsider = lab.network("outsider", environments=("sums 1",))
    wait_until(lambda: owner._context.is_up, 20, "it is up")
    owner.publish(1, make_groups(name_of(owner), 1))
    assert ask_raw(outsider, owner, 10**15) == "not-ready"
    assert ask_raw(outsider, owner, 2) is Kind.WAIT


def test_same_groups_are_given_to_the_same_peer_a_few_times(lab: Lab) -> None:
    lab.bootnode()
    owner = lab.peer("owner")
    outsiders = [lab.network(name, environments=("sums 1",)) for name in ("one", "two")]
    wait_until(lambda: owner._context.is_up, 20, "it is up")
    for round in (1, 2):
        owner.publish(round, make_groups(name_of(owner), round))
    assert [ask_raw(outsiders[0], owner, 1) for _ in range(5)] == 3 * [Kind.GROUPS] + 2 * ["flood"]
    assert ask_raw(outsiders[0], owner, 2) is Kind.GROUPS
    assert ask_raw(outsiders[1], owner, 1) is Kind.GROUPS
    assert owner.status().groups_offered == 5 * 9


def test_own_request_that_is_not_answered_leaves_the_peers_own_standing(lab: Lab) -> None:
    async def on_ask(peer_id: str, ask: Ask, stream: Stream) -> None:
        await asyncio.sleep(30)

    async def ask() -> Kind:
        async with slow.connections.stream(name_of(owner), owner._context.addresses) as stream:
            await stream.send(encode_ask(2, 60, slow.context.member().sealed))
            while (await stream.receive(messages.MAX_FRAME_BYTES))[0] is Kind.WAIT:
                pass
            return Kind.GROUPS

    lab.bootnode()
    owner = lab.peer("owner", collect_timeout_seconds=30.0)
    slow = lab.network("slow", on_ask=on_ask)
    wait_until(lambda: owner.status().peers_known == 1, 20, "it is known")
    answers: list[Kind] = []
    threading.Thread(target=lambda: answers.append(slow.call(ask(), 60)), daemon=True).start()
    wait_until(lambda: len(owner._serving._asking) == 1, 10, "its request stands")
    assert owner.collect(1, 9).heard == ()  # it took too long
    owner.publish(2, make_groups(name_of(owner), 2))
    wait_until(lambda: answers == [Kind.GROUPS], 5, "its request is answered")


def test_groups_of_a_peer_that_is_gone_come_from_another(lab: Lab) -> None:
    lab.bootnode()
    owner, holder, late = lab.peer("owner"), lab.peer("holder"), lab.peer("late")
    meet(owner, holder, late)
    owner.publish(1, make_groups(name_of(owner), 1))
    holder.publish(1, make_groups(name_of(holder), 1))
    assert len(holder.collect(1, 9).groups) == 9
    owner.close()
    collected = late.collect(1, 18)
    assert {g.peer_id for g in collected.groups} == {name_of(owner), name_of(holder)}
    assert collected.heard == (name_of(holder),)


def test_holder_that_changes_the_groups_is_to_blame_and_not_their_owner(lab: Lab) -> None:
    async def on_ask(peer_id: str, ask: Ask, stream: Stream) -> None:
        me = liar.context.identity
        forged = messages.seal_groups(
            me, ask.round, make_groups(ask.owner or me.peer_id, ask.round)
        )
        await stream.send(messages.encode_frame(Kind.GROUPS, forged))

    lab.bootnode()
    owner, asker = lab.peer("owner", max_askers=1), lab.peer("asker")
    liar = lab.network("liar", on_ask=on_ask)
    wait_until(
        lambda: asker.status().peers_known == owner.status().peers_known == 2,
        20,
        "they know each other",
    )
    owner.publish(1, make_groups(name_of(owner), 1))
    wait_until(lambda: (1, 0) in owner._serving._ours, 5, "they are served")
    owner._serving._ours[Place(1, 0)].holders.append(liar.context.identity.peer_id)
    make_full(lab, owner)
    collected = asker.collect(1, 18)
    assert {g.peer_id for g in collected.groups} == {
        liar.context.identity.peer_id
    }  # its own are in order
    assert set(collected.rejected) == {"signature"}
    assert set(asker.status().rejected_by_peer) == {liar.context.identity.peer_id}


@pytest.mark.parametrize("how", ["listed", "registered"])
def test_only_allowed_peers_exchange(lab: Lab, caplog: pytest.LogCaptureFixture, how: str) -> None:
    lab.bootnode()
    friend, outsider = lab.peer("friend"), lab.peer("outsider")
    only = {"only_peers": (name_of(friend),)} if how == "listed" else {"only_registered": True}
    picky = lab.peer("picky", **only)
    meet(friend, outsider, picky)
    if how == "registered":
        assert set(picky.peers()) == {name_of(friend), name_of(outsider)}
        picky.allow_registered([name_of(friend)])
    for swarm in (friend, outsider, picky):
        swarm.publish(1, make_groups(name_of(swarm), 1))
    assert {g.peer_id for g in picky.collect(1, 18).groups} == {name_of(friend)}
    with caplog.at_level(logging.WARNING):
        assert {g.peer_id for g in outsider.collect(1, 18).groups} == {name_of(friend)}
    assert picky.status().requests_refused == {"not-allowed": 1}
    assert f"request refused by peer={name_of(picky)} round=1 reason=not-allowed" in caplog.text
    assert {g.peer_id for g in friend.collect(1, 18).groups} == {name_of(outsider), name_of(picky)}
