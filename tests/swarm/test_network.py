"""Real networks between peers: islands that rejoin, and hosts that nobody can connect to."""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hivemind.p2p import PeerID
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr
from hosts import Hosts, why_not
from swarm_lab import collect_all, make_groups, multiaddrs, wait_until

from worker.records import Group
from worker.swarm.swarm import Swarm

pytestmark = pytest.mark.lab


@pytest.fixture
def make_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[dict[str, int]], Hosts]]:
    if reason := why_not():
        if os.environ.get("LAB_REQUIRED") == "1":
            pytest.fail(f"LAB_REQUIRED is 1, but {reason}")
        pytest.skip(reason)
    made: list[Hosts] = []

    def make(numbers: dict[str, int]) -> Hosts:
        made.append(Hosts(tmp_path, numbers, monkeypatch))
        return made[0]

    yield make
    for hosts in made:
        hosts.close()


def train(swarms: dict[str, Swarm], round: int) -> dict[str, set[str]]:
    """One round of all; whose groups each one got, by name."""
    names = {swarm.status().peer_id: name for name, swarm in swarms.items()}
    for swarm in swarms.values():
        swarm.publish(round, make_groups(swarm.status().peer_id, round))
    results = collect_all(list(swarms.values()), round, want=9 * (len(swarms) - 1))
    return {
        name: {names[group.peer_id or ""] for group in collected.groups}
        for name, collected in zip(swarms, results, strict=True)
    }


def has_direct_connection(one: Swarm, other: Swarm) -> bool:
    """Whether any connection between the two does without a relay."""
    network = one._network
    assert network.connections.daemon is not None
    response = network.call(
        network.connections.daemon._call(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS)), 5
    )
    addresses = [
        p.addrs[0] for p in response.peers if PeerID(p.id).to_base58() == other.status().peer_id
    ]
    return any("p2p-circuit" not in str(Multiaddr(address)) for address in addresses)


def write_long(group: Group) -> Group:
    """Return the group with completions that hardly compress."""
    return replace(
        group, completions=tuple(random.Random(i).randbytes(8000).hex() for i in range(4))
    )


def test_two_islands_go_on_by_themselves_and_find_together_again(
    make_hosts: Callable[[dict[str, int]], Hosts],
) -> None:
    hosts = make_hosts({"bootnode": 1, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5})
    hosts.announce_every_seconds = 2.0  # so that the islands forget each other for good
    hosts.bootnode()
    swarms = {name: hosts.peer(name, peers_per_round=4) for name in "abcde"}
    wait_until(
        lambda: all(s.status().peers_known == 4 for s in swarms.values()), 30, "all know all"
    )
    assert train(swarms, 1) == {name: set("abcde") - {name} for name in "abcde"}

    hosts.cables.split([4, 5])
    mainland, island = set("abc"), set("de")
    wait_until(
        lambda: [s.status().peers_known for s in swarms.values()] == [2, 2, 2, 1, 1],
        40,
        "they forget",
    )
    heard = train(swarms, 2)
    assert heard == {name: (mainland if name in mainland else island) - {name} for name in "abcde"}
    assert {s.status().state for s in swarms.values()} == {"connected"}

    hosts.cables.split([5])
    hosts.cables.heal([4])
    wait_until(lambda: swarms["e"].status().peers_known == 0, 20, "e is alone")
    assert swarms["e"].collect(3, 9).heard == ()
    assert swarms["e"].status().state == "training-alone"

    hosts.cables.heal([5])
    wait_until(
        lambda: all(s.status().peers_known == 4 for s in swarms.values()), 40, "all know all again"
    )
    assert swarms["e"].status().state == "catching-up"
    # A host that could not be reached a moment ago may be tried again only after the first of these
    # rounds.
    heard_in = [train(swarms, round) for round in (4, 5, 6)]
    assert {name: set("abcde") - {name} for name in "abcde"} in heard_in
    assert {s.status().state for s in swarms.values()} == {"connected"}


def test_hosts_that_nobody_can_connect_to_exchange_through_a_relay(
    make_hosts: Callable[[dict[str, int]], Hosts],
) -> None:
    hosts = make_hosts({"bootnode": 1, "a": 2, "b": 3, "public": 4})
    hosts.cables.shield(2, banned=(3,))
    hosts.cables.shield(3, banned=(2,))
    hosts.bootnode()
    swarms = {name: hosts.peer(name, reachability="private") for name in "ab"}
    swarms["public"] = hosts.peer("public", reachability="public")
    wait_until(lambda: all(has_relay(swarms[name]) for name in "ab"), 30, "have a relay")
    wait_until(
        lambda: all(s.status().peers_known == 2 for s in swarms.values()), 30, "all know all"
    )
    assert train(swarms, 1) == {name: set(swarms) - {name} for name in swarms}
    # 600 KB: more than libp2p's relays let through when nobody tells them otherwise.
    swarms["b"].publish(2, [write_long(g) for g in make_groups(swarms["b"].status().peer_id, 2)])
    assert len(swarms["a"].collect(2, 9).groups) == 9
    assert not has_direct_connection(swarms["a"], swarms["b"])


def test_hole_is_punched_once_enough_peers_say_where_they_see_us(
    make_hosts: Callable[[dict[str, int]], Hosts],
) -> None:
    # libp2p believes in the address that others see it at, which a hole takes, once four of them
    # have said the same. By then the connection through the relay is long made, and that is the
    # only time at which libp2p tries by itself.
    hosts = make_hosts({"bootnode": 1, "a": 2, "b": 3, "late1": 4, "late2": 5, "late3": 6})
    hosts.announce_every_seconds = 2.0
    hosts.cables.shield(2)
    hosts.cables.shield(3)
    hosts.bootnode()
    swarms = {name: hosts.peer(name, reachability="private") for name in "ab"}
    wait_until(lambda: all(has_relay(s) for s in swarms.values()), 30, "have a relay")
    wait_until(
        lambda: all(s.status().peers_known == 1 for s in swarms.values()),
        30,
        "they know each other",
    )
    assert train(swarms, 1) == {"a": {"b"}, "b": {"a"}}
    assert not has_direct_connection(swarms["a"], swarms["b"])

    for name in ("late1", "late2", "late3"):
        late = multiaddrs(hosts.bootnode(name))
        for swarm in swarms.values():
            swarm.join_through(late)
    wait_until(
        lambda: has_direct_connection(swarms["a"], swarms["b"]), 40, "they are connected directly"
    )
    assert train(swarms, 2) == {"a": {"b"}, "b": {"a"}}


def test_relay_is_taken_when_bootnodes_become_known_only_later(
    make_hosts: Callable[[dict[str, int]], Hosts],
) -> None:
    """Such as those of a chain that was away when the node started."""
    hosts = make_hosts({"bootnode": 1, "a": 2})
    hosts.cables.shield(2)
    swarm = hosts.peer("a", reachability="private")
    wait_until(lambda: swarm._context.is_up, 30, "it is up")
    assert swarm.status().reach == "none"
    swarm.join_through(multiaddrs(hosts.bootnode()))
    wait_until(lambda: swarm.status().reach == "relay", 30, "it has a relay")


def has_relay(swarm: Swarm) -> bool:
    return "/p2p-circuit" in str(swarm.status().addresses)
