"""Honest peers: they find each other, exchange, go on alone, and come back."""

import threading
import time

import pytest
from swarm_lab import Lab, collect_all, make_groups, multiaddrs, wait_until

from worker.errors import IdentityError, SwarmError
from worker.records import Collected
from worker.swarm.discovery import peer_cache
from worker.swarm.exchange import collector
from worker.swarm.swarm import Swarm


def publish(swarm: Swarm, round: int) -> None:
    swarm.publish(round, make_groups(swarm.status().peer_id, round))


def remembered(lab: Lab, name: str) -> tuple[str, ...]:
    """Addresses of peers that the peer would find after a restart."""
    return peer_cache.load(lab.folder(name) / "peers.json").peers


def test_three_nodes_find_each_other_and_exchange(lab: Lab) -> None:
    lab.bootnode()
    swarms = [lab.peer(name) for name in "abc"]
    names = [s.status().peer_id for s in swarms]
    assert {s.status().state for s in swarms} <= {"starting", "connected"}
    seconds = wait_until(
        lambda: all(s.status().peers_known == 2 for s in swarms), 30, "all know all"
    )
    assert seconds < 30  # 1.2 s on an idle machine

    for round in (7, 8):
        for swarm in swarms:
            publish(swarm, round)
        for swarm, collected in zip(swarms, collect_all(swarms, round, want=18), strict=True):
            others = sorted(set(names) - {swarm.status().peer_id})
            assert collected.heard == tuple(others)
            assert collected.rejected == {}
            came = sorted((g.peer_id, g.task.index) for g in collected.groups)
            assert came == [(p, i) for p in others for i in range(9)]
            assert {g.rewards for g in collected.groups} == {(1.0, 0.0, 0.0, 0.0)}
    status = swarms[0].status()
    assert status.state == "connected"
    assert (status.groups_fetched, status.groups_verified) == (36, 36)
    assert status.bytes_in > 1000
    assert status.bytes_out > 1000
    assert status.addresses[0].endswith(f"/p2p/{status.peer_id}")
    assert status.last_error is None


def test_alone_is_a_state_and_late_bootnodes_are_joined(lab: Lab) -> None:
    alone = lab.peer("a")
    publish(alone, 1)
    started = time.monotonic()
    assert alone.collect(1, 4) == Collected()
    assert time.monotonic() - started < 6  # collect_timeout_seconds
    assert alone.status().state == "training-alone"

    bootnode = lab.bootnode()
    other = lab.peer("b")
    alone.join_through(multiaddrs(bootnode))
    wait_until(lambda: alone.status().peers_known == 1, 15, "a knows b")
    publish(other, 2)
    assert len(alone.collect(2, 9).groups) == 9
    assert alone.status().state == "connected"


def test_no_more_peers_are_asked_than_will_do_unless_one_is_late(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.bootnode()
    asker, *others = [lab.peer(name) for name in "abcd"]
    wait_until(lambda: asker.status().peers_known == 3, 15, "a knows all")
    for other in others:
        publish(other, 1)
    with monkeypatch.context() as patch:
        patch.setattr(
            collector, "LOOK_EVERY_SECONDS", 60.0
        )  # on a busy machine an answer may take more than one
        assert len(asker.collect(1, 27).heard) == 3
        assert len(asker.collect(1, 18).heard) == 2
        assert len(asker.collect(1, 9).heard) == 1

    publish(others[0], 2)
    assert len(asker.collect(2, 9).groups) == 9


def test_standing_request_is_answered_when_the_groups_are_ready(lab: Lab) -> None:
    lab.bootnode()
    early, late = lab.peer("a"), lab.peer("b")
    wait_until(lambda: early.status().peers_known == 1, 15, "a knows b")
    timer = threading.Timer(1.5, publish, (late, 3))
    timer.start()
    started = time.monotonic()
    collected = early.collect(3, 9)
    assert 1.4 < time.monotonic() - started < 15
    assert len(collected.groups) == 9


def test_round_that_a_peer_skipped_is_refused_at_once(lab: Lab) -> None:
    lab.bootnode()
    slow, fast = lab.peer("a"), lab.peer("b")
    wait_until(lambda: slow.status().peers_known == 1, 15, "a knows b")
    for round in (10, 11, 12, 13):
        publish(fast, round)
    assert len(slow.collect(11, 9).groups) == 9  # three rounds are kept
    started = time.monotonic()
    collected = slow.collect(10, 9)
    assert time.monotonic() - started < 5
    assert collected == Collected(heard=(fast.status().peer_id,))
    slow._context.learn(
        fast._context.member().sealed, sender=""
    )  # records are renewed once a minute
    slow.collect(10, 9)
    assert slow.status().state == "catching-up"
    assert len(slow.collect(13, 9).groups) == 9
    assert slow.status().state == "connected"


def test_peers_that_vanish_are_noticed_within_a_round_and_found_again(lab: Lab) -> None:
    bootnode = lab.bootnode()
    stays, leaves = lab.peer("a"), lab.peer("b")
    wait_until(lambda: stays.status().peers_known == 1, 15, "a knows b")
    publish(leaves, 1)
    assert stays.collect(1, 9).heard
    leaves.close()
    bootnode.close()

    assert stays.collect(2, 9) == Collected()
    assert stays.status().state == "training-alone"
    assert stays.status().peers_heard == ()

    back = lab.peer("b", bootnodes=())
    wait_until(lambda: stays.status().state == "catching-up", 25, "a hears b again")
    publish(back, 3)
    assert len(stays.collect(3, 9).groups) == 9
    assert stays.status().state == "connected"


@pytest.mark.parametrize(("k", "want"), [(0, 9), (4, 0)])
def test_state_is_true_though_nobody_is_ever_asked(lab: Lab, k: int, want: int) -> None:
    lab.announce_every_seconds = 2.0  # contact is old after 6 s
    alone = lab.peer("a", peers_per_round=k)
    assert alone.collect(1, want) == Collected()
    wait_until(lambda: alone.status().state == "training-alone", 5, "nobody is there")

    bootnode, other = lab.bootnode(), lab.peer("b")
    alone.join_through(multiaddrs(bootnode))
    wait_until(lambda: alone.status().state == "connected", 15, "somebody is")
    for part in (other, bootnode):
        part.close()
    wait_until(lambda: alone.status().state == "training-alone", 15, "nobody is any more")


def test_swarm_survives_the_loss_of_every_bootnode(lab: Lab) -> None:
    bootnode = lab.bootnode()
    first = [lab.peer(name) for name in "ab"]
    wait_until(lambda: all(s.status().peers_known == 1 for s in first), 15, "both know each other")
    wait_until(lambda: all(remembered(lab, n) for n in "ab"), 15, "both have a peer cache")
    addresses = [s.status().addresses for s in first]
    for part in (*first, bootnode):
        part.close()

    second = [lab.peer(name, bootnodes=()) for name in "ab"]
    wait_until(
        lambda: all(s.status().peers_known == 1 for s in second), 20, "both find each other again"
    )
    assert [s.status().addresses for s in second] == addresses


def test_swarm_whose_bootnodes_are_all_killed_goes_on_and_takes_back_who_restarts(lab: Lab) -> None:
    bootnodes = [lab.bootnode(name) for name in ("one", "two")]
    swarms = {name: lab.peer(name) for name in "abc"}
    wait_until(
        lambda: all(s.status().peers_known == 2 for s in swarms.values()), 20, "all know all"
    )
    wait_until(lambda: all(remembered(lab, name) for name in "abc"), 15, "they are remembered")
    for bootnode in bootnodes:
        bootnode.close()

    swarms["c"].close()
    swarms["c"] = lab.peer("c")  # its settings still name the bootnodes, and nobody is there
    wait_until(lambda: all(s.status().peers_known == 2 for s in swarms.values()), 30, "c is back")
    for swarm in swarms.values():
        publish(swarm, 5)
    for swarm, collected in zip(
        swarms.values(), collect_all(list(swarms.values()), 5, want=18), strict=True
    ):
        others = {s.status().peer_id for s in swarms.values()} - {swarm.status().peer_id}
        assert {g.peer_id for g in collected.groups} == others


def test_missing_identity_stops_the_swarm_and_is_not_made(lab: Lab) -> None:
    folder = lab.folder("a")
    (folder / "swarm.pem").unlink()
    with pytest.raises(IdentityError, match="identity missing"):
        lab.peer("a")
    assert list(folder.iterdir()) == []


def test_use_outside_of_its_life_is_an_error(lab: Lab) -> None:
    swarm = lab.peer("a", start=False)
    with pytest.raises(SwarmError, match=r"start\(\) comes first"):
        publish(swarm, 1)
    swarm.join_through(["/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"])
    swarm.allow_registered(["QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"])
    swarm.start()
    swarm.close()
    swarm.close()
    with pytest.raises(SwarmError, match="nothing after close"):
        swarm.collect(1, 1)


def test_peers_of_two_versions_say_so_and_do_not_ask_each_other(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    lab.bootnode()
    ours, old = lab.peer("ours"), lab.peer("old", version="sums 0.9")
    wait_until(
        lambda: ours.status().other_versions == {"sums 0.9": 1}, 15, "the other version is seen"
    )
    for number, swarm in enumerate((ours, old)):
        swarm.publish(1, make_groups(swarm.status().peer_id, 1))
        assert swarm.collect(1, 9).groups == (), number
    assert ours.status().state == "training-alone"
    wait_until(lambda: old.status().other_versions == {"sums 1": 1}, 15, "and so does the old one")
    said = [r for r in caplog.records if "another version" in r.getMessage()]
    assert len(said) == 2
    assert "theirs=sums 0.9 ours=sums 1" in caplog.text


def test_request_of_a_peer_with_another_version_is_refused_with_the_reason(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    lab.bootnode()
    ours = lab.peer("ours", peers_per_round=0)
    asker = lab.peer("asker")
    wait_until(lambda: asker.status().peers_known == 1, 15, "they know each other")
    own_record = asker._context.own_record  # it upgrades, and its view is old
    own_record.environments, own_record._newest = ("sums 2",), None
    ours.publish(1, make_groups(ours.status().peer_id, 1))
    assert asker.collect(1, 9).groups == ()
    assert "reason=environment: this node has sums 1, yours does not" in caplog.text


def test_a_peer_with_planted_text_is_counted_and_drawn_less(lab: Lab, caplog) -> None:
    lab.bootnode()
    us, other = lab.peer("a"), lab.peer("b")
    wait_until(lambda: us.status().peers_known == 1, 30, "a knows b")
    name = other.status().peer_id
    us.note_planted({name: 2})
    wait_until(lambda: us.status().rejected_by_peer == {name: 2}, 10, "the groups are counted")
    assert us.status().rejected == {"planted": 2}
    assert us._context.peers._weigh(name, time.monotonic()) < 0.3
    assert f"groups with planted text peer={name} groups=2" in caplog.text
