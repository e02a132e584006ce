"""A liar changes not one bit of an honest node's weights.

Nodes without a chain wait for the groups of a round (`collect`); others take what has come (`ask`
and `take`).
"""

import copy
import random
from dataclasses import replace

import pytest
import torch
from lies import (
    Lie,
    change_task,
    lie_with_bomb,
    lie_with_waits,
    send_groups,
    trickle,
)
from swarm_lab import Lab, make_groups, wait_until

from worker import settings
from worker.policy import policy as policies
from worker.policy.policy import Policy
from worker.records import Collected
from worker.swarm.identity import Identity
from worker.swarm.network import Network
from worker.swarm.protocol.messages import Ask
from worker.swarm.swarm import Swarm
from worker.swarm.transport.streams import Stream
from worker.trainer.batch import choose
from worker.trainer.trainer import Trainer

TRAINER = settings.Trainer(local_groups=0, external_groups=10, learning_rate=1e-3)
GENERATION = settings.Generation(num_generations=4, max_prompt_length=64, max_completion_length=64)


@pytest.fixture(scope="module")
def pristine() -> Policy:
    torch.set_num_threads(1)
    return policies.load(settings.Model(device="cpu"))


def train(policy: Policy, collected: Collected) -> list[torch.Tensor]:
    """Return the weights after a node's step on its collected groups, from the same start."""
    policy = Policy(copy.deepcopy(policy.model), policy.tokenizer, policy.name)
    trainer = Trainer(policy, TRAINER, GENERATION)
    batch = choose((), collected.groups, TRAINER, random.Random(1), trainer.find_fault)
    assert batch.num_external == TRAINER.external_groups
    assert trainer.step(batch.groups).skipped is None
    return [parameter.detach() for parameter in policy.model.parameters()]


def are_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Swarms:
    """Two honest peers with groups, and two that collect: one from all, one without the liar."""

    def __init__(self, lab: Lab) -> None:
        async def on_ask(peer_id: str, ask: Ask, stream: Stream) -> None:
            await self.lie(self.liar.context.identity, ask, stream)

        lab.bootnode()
        self.lie: Lie = trickle
        self.round = 0
        self.honest = [lab.peer(name) for name in "ab"]
        names = tuple(swarm.status().peer_id for swarm in self.honest)
        self.open = lab.peer("open", collect_timeout_seconds=4.0)
        self.sheltered = lab.peer("sheltered", collect_timeout_seconds=4.0, only_peers=names)
        self.liar: Network = lab.network("liar", on_ask=on_ask)
        wait_until(lambda: self.open.status().peers_known == 4, 30, "all are known")
        wait_until(lambda: self.sheltered.status().peers_known == 4, 30, "all are known")

    def play(self, lie: Lie, mode: str) -> tuple[Collected, Collected]:
        self.lie, self.round = lie, self.round + 1
        for swarm in self.honest:
            swarm.publish(self.round, make_groups(swarm.status().peer_id, self.round))
        self.open._context.peers._conduct.clear()  # each lie is its first
        get = {"collect": self.collect, "take": self.ask_and_take}[mode]
        return get(self.open), get(self.sheltered)

    def collect(self, swarm: Swarm) -> Collected:
        swarm.publish(self.round, [])
        return swarm.collect(self.round, want=100)

    def ask_and_take(self, swarm: Swarm) -> Collected:
        """Take until the honest groups are there and the liar's request has ended."""
        swarm.publish(self.round, [])
        swarm.ask(self.round, want=100)
        names = {peer.status().peer_id for peer in self.honest}
        liar = self.liar.context.identity.peer_id
        come = [Collected()]

        def is_complete() -> bool:
            come[0] = come[0].plus(swarm.take(self.round))
            is_liar_done = swarm is self.sheltered or liar in come[0].heard
            is_asking = swarm._open is not None and liar in swarm._open._asked()
            return names <= {g.peer_id for g in come[0].groups} and is_liar_done and not is_asking

        wait_until(is_complete, 20, "all that is to come has come")
        return come[0]


@pytest.fixture(scope="module")
def swarms(module_lab: Lab) -> Swarms:
    return Swarms(module_lab)


async def tell_the_truth(me: Identity, ask: Ask, stream: Stream) -> None:
    await send_groups(lambda groups, _, __: groups)(me, ask, stream)


async def replay_old_groups(me: Identity, ask: Ask, stream: Stream) -> None:
    """Send groups of an earlier round than those that are of use."""
    old = Ask(ask.oldest.round - 1, ask.oldest, ask.patience, ask.member)
    await send_groups(lambda groups, _, __: groups)(me, old, stream)


LIES = {
    "of another peer": change_task(seed=5),
    "wrong answers": send_groups(
        lambda groups, _, __: [replace(g, completions=("it is 5", "5", "")) for g in groups]
    ),
    "nothing": send_groups(lambda *_: []),
    "replay": replay_old_groups,
    "flood": lie_with_waits,
    "bomb": lie_with_bomb,
    "slow-loris": trickle,
}


@pytest.mark.parametrize("mode", ["collect", "take"])
@pytest.mark.parametrize("name", LIES)
def test_weights_are_bit_for_bit_what_they_are_without_the_liar(
    swarms: Swarms, pristine: Policy, name: str, mode: str
) -> None:
    with_liar, without = swarms.play(LIES[name], mode)
    assert swarms.liar.context.identity.peer_id in with_liar.heard
    assert are_same(train(pristine, with_liar), train(pristine, without))


@pytest.mark.parametrize("mode", ["collect", "take"])
def test_one_more_honest_peer_changes_the_weights(
    swarms: Swarms, pristine: Policy, mode: str
) -> None:
    with_third, without = swarms.play(tell_the_truth, mode)
    assert not are_same(train(pristine, with_third), train(pristine, without))
