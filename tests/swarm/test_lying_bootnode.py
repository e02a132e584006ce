"""A bootnode that names wrong addresses, or is gone: real peers on loopback."""

import asyncio

from swarm_lab import Lab, make_groups, wait_until

from worker.errors import BadRecord
from worker.swarm.protocol import messages
from worker.swarm.transport.streams import UNREACHABLE


def test_peer_at_the_address_of_another_is_not_taken_for_it(lab: Lab) -> None:
    """libp2p authenticates the key at the other end, whatever the address claims."""
    honest, liar = lab.network("honest"), lab.network("liar")
    asker = lab.network("asker")

    async def ask() -> str:
        name, addresses = honest.context.identity.peer_id, liar.context.addresses
        try:
            async with asyncio.timeout(10), asker.connections.stream(name, addresses) as stream:
                await stream.ask(messages.encode_frame(messages.Kind.HELLO, b""), 1 << 16)
        except (*UNREACHABLE, BadRecord) as error:
            return type(error).__name__
        return "answered"

    assert asker.call(ask(), 15) != "answered"
    assert not liar.context.traffic["in"]


def test_node_whose_bootnode_is_gone_trains_alone(lab: Lab) -> None:
    bootnode = lab.bootnode()
    bootnode.close()
    node = lab.peer("node")
    node.publish(1, make_groups(node.status().peer_id, 1))
    assert node.collect(1, 9).groups == ()
    wait_until(lambda: node.status().state == "training-alone", 20, "it goes on alone")
