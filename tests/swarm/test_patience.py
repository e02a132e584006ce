"""Honest peers that are late or on a slow line, and peers whose answers are useless."""

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest
from lies import Lie, change_task, send_groups
from swarm_lab import Lab, TheseFirst, make_groups, wait_until

from worker.records import Task
from worker.swarm.identity import Identity
from worker.swarm.network import Network
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Ask, Kind
from worker.swarm.swarm import Swarm
from worker.swarm.transport.streams import Stream


def bring(lab: Lab, name: str, lie: Lie) -> Network:
    async def on_ask(peer_id: str, ask: Ask, stream: Stream) -> None:
        await lie(network.context.identity, ask, stream)

    network = lab.network(name, on_ask=on_ask)
    return network


def slow_down(swarm: Swarm, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each group take so long to score."""
    score = swarm._verifier._tasks.score

    def slow_score(task: Task, completions: Sequence[str]) -> list[float]:
        time.sleep(seconds)
        return score(task, completions)

    monkeypatch.setattr(swarm._verifier._tasks, "score", slow_score)


def test_honest_peer_that_is_late_is_not_blamed_and_what_was_scored_counts(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.bootnode()
    asker, late = lab.peer("asker", collect_timeout_seconds=5.0), lab.peer("late")
    wait_until(lambda: asker.status().peers_known == 1, 15, "they know each other")
    slow_down(asker, 0.3, monkeypatch)
    me = late.status().peer_id
    for round in (1, 2, 3):
        timer = threading.Timer(3.4, late.publish, (round, make_groups(me, round)))
        timer.start()
        collected = asker.collect(round, 9)
        timer.join()
        assert 1 <= len(collected.groups) < 9
        assert collected.rejected == {"late": 9 - len(collected.groups)}
    assert not asker._context.peers._conduct


def test_slow_node_does_not_blame_peers_and_what_it_has_scored_counts(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.bootnode()
    asker, peer = lab.peer("asker", collect_timeout_seconds=5.0), lab.peer("peer")
    wait_until(lambda: asker.status().peers_known == 1, 15, "they know each other")
    slow_down(asker, 0.7, monkeypatch)
    for round in (1, 2):
        peer.publish(round, make_groups(peer.status().peer_id, round))
        collected = asker.collect(round, 9)
        assert 1 <= len(collected.groups) <= 4
        assert collected.rejected == {"late": 9 - len(collected.groups)}
    assert not asker._context.peers._conduct


def test_node_that_asks_on_scores_what_came_just_before_the_end_of_its_requests(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.bootnode()
    asker, late = lab.peer("asker", collect_timeout_seconds=5.0), lab.peer("late")
    wait_until(lambda: asker.status().peers_known == 1, 15, "they know each other")
    slow_down(asker, 0.4, monkeypatch)
    asker.ask(1, 9)
    wait_until(lambda: len(late._serving._asking) == 1, 10, "its request stands")
    timer = threading.Timer(3.2, late.publish, (1, make_groups(late.status().peer_id, 1)))
    timer.start()
    wait_until(lambda: len(asker.take(1).groups) == 9, 10, "all are scored")
    timer.join()
    assert asker.status().rejected == {}


def test_peer_on_a_slow_line_has_the_whole_round_to_send_its_groups(lab: Lab) -> None:
    async def send_slowly(me: Identity, ask: Ask, stream: Stream) -> None:
        groups = messages.seal_groups(me, ask.round, make_groups(me.peer_id, ask.round))
        frame = messages.encode_frame(Kind.GROUPS, groups)  # ready, so without a WAIT
        step = len(frame) // 35 + 1
        for start in range(0, len(frame), step):
            await stream.send(frame[start : start + step])
            await asyncio.sleep(0.2)

    lab.bootnode()
    asker = lab.peer("asker", collect_timeout_seconds=20.0)
    bring(lab, "slow", send_slowly)
    wait_until(lambda: asker.status().peers_known == 1, 15, "it is known")
    started = time.monotonic()
    assert len(asker.collect(1, 9).groups) == 9
    assert time.monotonic() - started > 5.5
    assert asker.status().state == "connected"


@pytest.mark.parametrize(
    "lie", [send_groups(lambda *_: []), change_task(seed=5)], ids=["empty", "wrong seeds"]
)
def test_answers_of_no_use_are_replaced_by_other_draws(
    lab: Lab, lie: Lie, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.bootnode()
    asker, honest = (
        lab.peer("asker", peers_per_round=2, collect_timeout_seconds=20.0),
        lab.peer("honest"),
    )
    liars = [bring(lab, name, lie) for name in ("one", "two")]
    peers = asker._context.peers
    wait_until(lambda: len(peers.known()) == 3, 20, "all are known")
    wait_until(lambda: not any(map(peers.num_failures, peers.known())), 20, "none failed")
    rng = asker._context.rng = TheseFirst(1)
    rng.first = frozenset(liar.context.identity.peer_id for liar in liars)
    heard: set[str] = set()
    hear = asker._context.hear

    def note_and_hear(peer_id: str) -> None:
        heard.add(peer_id)
        hear(peer_id)

    monkeypatch.setattr(asker._context, "hear", note_and_hear)

    def publish() -> None:
        """Publish once both have answered; afterwards there is no need to wait for anybody."""
        wait_until(lambda: heard >= rng.first, 20, "both have answered")
        honest.publish(1, make_groups(honest.status().peer_id, 1))

    publishing = threading.Thread(target=publish)
    publishing.start()
    collected = asker.collect(1, 9)
    publishing.join()
    assert len(collected.heard) == 3
    assert {g.peer_id for g in collected.groups} == {honest.status().peer_id}
    assert len(collected.groups) == 9
