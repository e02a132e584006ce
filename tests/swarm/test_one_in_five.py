"""Four honest peers and a liar: each honest one catches each lie within the round.

What the honest peers get from each other is the same as without the liar.
"""

from collections.abc import Iterator
from dataclasses import replace

import msgpack
import pytest
import zstandard
from lies import (
    Lie,
    lie_with_bomb,
    lie_with_replay,
    lie_with_waits,
    make_bomb,
    seal,
    send_groups,
    trickle,
)
from swarm_lab import Lab, collect_all, make_groups, wait_until

from tests.groups import scored_group
from worker.records import Group, Place, ScoredGroup, Task, round_seed
from worker.swarm.identity import Identity
from worker.swarm.network import Network
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Ask, Kind
from worker.swarm.swarm import Swarm
from worker.swarm.transport.streams import Stream


class Five:
    def __init__(self, lab: Lab) -> None:
        async def on_ask(peer_id: str, ask: Ask, stream: Stream) -> None:
            await self.lie(self.liar.context.identity, ask, stream)

        lab.bootnode()
        self.lie: Lie = trickle
        make_bomb()  # takes a second, and nobody is to wait for it
        self.honest = [lab.peer(name, collect_timeout_seconds=4.0) for name in "abcd"]
        self.liar: Network = lab.network("liar", on_ask=on_ask)
        self.round = 0
        wait_until(
            lambda: all(s.status().peers_known == 4 for s in self.honest), 30, "all know all"
        )

    @property
    def victim(self) -> str:
        return self.honest[0].status().peer_id

    def play(self, lie: Lie) -> list[tuple[set[ScoredGroup], list[ScoredGroup], dict[str, int]]]:
        """Play one round.

        Return, for each honest peer, the groups of honest ones, those of the liar, and the
        rejections.
        """
        self.lie, self.round = lie, self.round + 1
        for swarm in self.honest:
            swarm._context.peers._conduct.clear()  # each lie is its first
            swarm.publish(self.round, make_groups(swarm.status().peer_id, self.round))
        results = collect_all(self.honest, self.round, want=37)
        me = self.liar.context.identity.peer_id
        return [
            (
                {g for g in collected.groups if g.peer_id != me},
                [g for g in collected.groups if g.peer_id == me],
                collected.rejected,
            )
            for collected in results
        ]

    def expected(self, swarm: Swarm) -> set[ScoredGroup]:
        """Return what the swarm would get without the liar."""
        others = [s.status().peer_id for s in self.honest if s is not swarm]
        return {
            scored_group(
                g.task,
                f"{g.task.seed}+{g.task.index}?",
                g.completions,
                (1.0, 0.0, 0.0, 0.0),
                peer_id=p,
            )
            for p in others
            for g in make_groups(p, self.round)
        }


@pytest.fixture(scope="module")
def five(module_lab: Lab) -> Iterator[Five]:
    return Five(module_lab)


async def inflate_rewards(me: Identity, ask: Ask, stream: Stream) -> None:
    seed = round_seed(me.peer_id, ask.round)
    rows = [["sum", "x", seed, i, ["no idea", "none"], [1.0, 1.0]] for i in range(9)]
    sealed = seal(me, zstandard.compress(msgpack.packb([me.peer_id, ask.round, rows])))
    await stream.send(messages.encode_frame(Kind.GROUPS, sealed))


def copy_completions(victim: str) -> Lie:
    """Sign the tasks and completions of another peer as one's own."""
    return send_groups(lambda _, __, round: make_groups(victim, round))


def copy_message(victim: Swarm) -> Lie:
    """Send the whole message of another peer, as it was signed."""

    async def lie(me: Identity, ask: Ask, stream: Stream) -> None:
        await stream.send(victim._serving._ours[Place(ask.round, 0)].frame)

    return lie


def swap_recipe(groups: list[Group], me: str, round: int) -> list[Group]:
    """Replace each task that belongs to the peer and round by an easy one."""
    return [
        Group(Task("sum", "x", 1, g.task.index), (str(1 + g.task.index), "2", "3")) for g in groups
    ]


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        ("malformed", "inflated reward"),
        ("seed", "copied completions"),
        ("signature", "copied message"),
        ("seed", "swapped recipe"),
        ("round", "replay"),
        ("flood", "flood"),
        ("too-large", "bomb"),
    ],
)
def test_lie_is_caught_by_all_and_changes_nothing(five: Five, reason: str, name: str) -> None:
    lies: dict[str, Lie] = {
        "inflated reward": inflate_rewards,
        "copied completions": copy_completions(five.victim),
        "copied message": copy_message(five.honest[0]),
        "swapped recipe": send_groups(swap_recipe),
        "replay": lie_with_replay,
        "flood": lie_with_waits,
        "bomb": lie_with_bomb,
    }
    for swarm, (honest, lying, rejected) in zip(five.honest, five.play(lies[name]), strict=True):
        assert honest == five.expected(swarm)
        assert lying == []
        assert set(rejected) == {reason}


def test_wrong_answers_get_the_reward_that_they_deserve(five: Five) -> None:
    wrong = send_groups(
        lambda groups, _, __: [replace(g, completions=("it is 5", "5", "")) for g in groups]
    )
    for swarm, (honest, lying, rejected) in zip(five.honest, five.play(wrong), strict=True):
        assert honest == five.expected(swarm)
        assert {g.rewards for g in lying} == {(0.0, 0.0, 0.0)}
        assert not any(g.has_signal for g in lying)  # nothing to learn from: the sampler drops them
        assert rejected == {}


def test_slow_loris_costs_nobody_a_group(five: Five) -> None:
    for swarm, (honest, lying, _) in zip(five.honest, five.play(trickle), strict=True):
        assert honest == five.expected(swarm)
        assert lying == []


def test_liar_that_floods_with_requests_is_limited_and_the_round_goes_on(five: Five) -> None:
    hello = messages.encode_frame(Kind.HELLO, five.liar.context.member().sealed)

    async def flood() -> None:
        for _ in range(200):
            async with five.liar.connections.stream(five.victim) as stream:
                await stream.send(hello)

    five.liar.post(lambda: five.liar._thread._loop.create_task(flood()))  # type: ignore[union-attr]
    for swarm, (honest, _, _) in zip(five.honest, five.play(lie_with_replay), strict=True):
        assert honest == five.expected(swarm)
    wait_until(
        lambda: five.honest[0].status().requests_refused.get("flood", 0) > 0,
        20,
        "the flood is refused",
    )


def test_liar_is_quarantined_for_a_growing_time(
    five: Five, caplog: pytest.LogCaptureFixture
) -> None:
    peers, me = five.honest[0]._context.peers, five.liar.context.identity.peer_id
    five.play(lie_with_replay)
    assert not peers.is_quarantined(me)
    assert "reasons=round:1" in caplog.text
    five.honest[0].publish(five.round, make_groups(five.victim, five.round))
    five.honest[0].collect(five.round, 37)
    assert peers.is_quarantined(me)
    assert f"peer quarantined peer={me} seconds=60" in caplog.text
    honest = five.honest[0].collect(five.round, 37)
    assert set(honest.groups) == five.expected(five.honest[0])
    assert me not in honest.heard
