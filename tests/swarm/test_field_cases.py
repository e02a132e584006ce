"""Situations of operators: foreign bootnodes, late relays, rounds too large, slow peers."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from swarm_lab import Lab, make_groups, multiaddrs, wait_until
from test_other_implementations import running

from worker.records import Group
from worker.swarm.swarm import Swarm
from worker.swarm.transport import reachability


@pytest.fixture
def plain_bootnode() -> Iterator[str]:
    """Yield the address of a plain hivemind node, which is not a hivewright bootnode."""
    with running("plain.py") as program:
        yield program.hear()


def test_bootnode_that_is_a_plain_hivemind_node_is_named(
    lab: Lab, plain_bootnode: str, caplog: pytest.LogCaptureFixture
) -> None:
    lab.bootnodes = (plain_bootnode,)
    peer_id = plain_bootnode.rpartition("/p2p/")[2]
    with caplog.at_level("WARNING"):
        node = lab.peer("a")
        wait_until(
            lambda: node.status().foreign_bootnodes == (peer_id,), 20, "it is named in the status"
        )
    assert "bootnode answers, but is not hivewright's (no /hivewright/exchange)" in caplog.text
    assert reachability.reach([plain_bootnode]) == {
        plain_bootnode: "answers, but is not hivewright's (no /hivewright/exchange)"
    }


def test_bootnode_of_ours_is_not_named(lab: Lab) -> None:
    own = multiaddrs(lab.bootnode())[0]
    node, other = lab.peer("a"), lab.peer("b")
    wait_until(
        lambda: {n.status().peers_known for n in (node, other)} == {1}, 15, "they met through it"
    )
    assert reachability.reach([own]) == {own: None}
    assert node.status().foreign_bootnodes == ()


def test_public_node_is_not_started_again_for_a_bootnode(lab: Lab) -> None:
    node = lab.peer("public", reachability="public")
    wait_until(lambda: node._context.is_up, 30, "it is up")
    node.join_through(multiaddrs(lab.bootnode()))
    time.sleep(1)
    assert node.status().daemon_restarts == 0
    assert node.status().reach == "direct"


def groups_of(swarm: Swarm, round: int, count: int, length: int = 1) -> list[Group]:
    return [
        Group(group.task, tuple(text + "x" * length for text in group.completions))
        for group in make_groups(swarm.status().peer_id, round, count)
    ]


def test_as_much_as_fits_is_shared_and_taken(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.bootnode()
    large, other = lab.peer("large"), lab.peer("other")
    wait_until(lambda: other.status().peers_known == 1, 15, "they know each other")
    with caplog.at_level("WARNING"):
        published = large.publish(1, groups_of(large, 1, 400))
    assert len(published.groups) == 64
    assert "shared=64 not_shared=336 reasons={'index': 336}" in caplog.text
    assert len(other.collect(1, 64).groups) == 64


def test_one_group_that_is_too_large_costs_no_other(lab: Lab) -> None:
    node = lab.peer("a", start=False)
    small = groups_of(node, 1, 3)
    huge = Group(small[0].task, ("x" * 20_000,) * 4)
    assert list(node._acceptable(1, [huge, *small[1:]], 0)) == small[1:]


def test_first_groups_have_the_room(lab: Lab) -> None:
    node = lab.peer("a", start=False)
    groups = groups_of(node, 1, 60, length=15_000)
    kept = node._acceptable(1, groups[::-1], 0)
    assert 30 < len(kept) < 40
    assert kept == groups[::-1][: len(kept)]


def test_waiting_for_a_slow_peer_is_told_apart_from_work(lab: Lab, tmp_path: Path) -> None:
    lab.bootnode()
    fast, slow = lab.peer("fast"), lab.peer("slow")
    wait_until(lambda: fast.status().peers_known == 1, 15, "they know each other")
    fast.publish(1, make_groups(fast.status().peer_id, 1))
    started = time.monotonic()
    collected = fast.collect(1, 9)  # the slow one is not there yet: until the time is up
    seconds = time.monotonic() - started
    assert collected.groups == ()
    assert 0.8 * seconds <= collected.seconds_waiting <= seconds
    slow.publish(1, make_groups(slow.status().peer_id, 1))
    assert fast.collect(1, 9).seconds_waiting < 2.0
