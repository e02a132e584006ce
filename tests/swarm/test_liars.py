"""One of two peers lies: it is caught within the round, and the honest one's groups arrive."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from lies import (
    LIES,
    Lie,
    change_task,
    end_in_the_middle,
    lie_with_bomb,
    lie_with_bomb_of_objects,
    lie_with_replay,
    lie_with_size,
    lie_with_wrong_kind,
    promise,
    say_nothing,
    send_groups,
    trickle,
)
from swarm_lab import GROUP_SIZE, Lab, make_groups, wait_until

from worker.errors import BadRecord
from worker.records import Task, round_seed
from worker.swarm.identity import Identity
from worker.swarm.network import Network
from worker.swarm.protocol.messages import Ask
from worker.swarm.transport.streams import Stream


class LiarFirst(random.Random):
    """Draws the liar before anybody else, so that no run is lucky."""

    liar = ""

    def choices(self, population, weights=None, **options):  # type: ignore[no-untyped-def]
        return (
            [self.liar]
            if self.liar in population
            else super().choices(population, weights, **options)
        )


class Stage:
    """An honest asker and an honest server, and a liar between them that differs in each test."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        lab.announce_every_seconds = 3.0  # the liars that went are to be forgotten soon
        lab.bootnode()
        self.asker = lab.peer("asker", peers_per_round=1, collect_timeout_seconds=6.0)
        self.honest = lab.peer("honest")
        self.rng = LiarFirst(1)
        self.asker._context.rng = self.rng
        self.round = 100
        self.num_liars = 0
        self.liar: Network | None = None
        wait_until(
            lambda: self.asker.status().peers_known == 1, 15, "the honest ones know each other"
        )

    def bring(self, lie: Lie) -> Network:
        async def on_ask(peer_id: str, ask: Ask, stream: Stream) -> None:
            await lie(liar.context.identity, ask, stream)

        self.num_liars += 1
        liar = self.liar = self.lab.network(f"liar{self.num_liars}", on_ask=on_ask)
        self.rng.liar = liar.context.identity.peer_id
        wait_until(
            lambda: bool(self.asker._context.peers.addresses(self.rng.liar)),
            15,
            "the liar is known",
        )
        return liar

    def send_away(self) -> None:
        if self.liar is not None:
            self.liar.close()
            self.asker._context.peers.failed(self.rng.liar)
            self.liar = None

    def set(self, **changes: object) -> None:
        self.asker._swarm = self.asker._swarm.model_copy(update=changes)

    def publish(self) -> None:
        """Publish a new round of the honest peer."""
        self.round += 1
        self.honest.publish(self.round, make_groups(self.honest.status().peer_id, self.round))

    def collect(self) -> dict[str, int]:
        """Ask everybody; the honest one's groups must come, in time. Returns what was rejected."""
        started = time.monotonic()
        collected = self.asker.collect(self.round, 9)
        assert sum(g.peer_id == self.honest.status().peer_id for g in collected.groups) == 9
        assert time.monotonic() - started < 15
        assert self.asker.status().state == "connected"
        return collected.rejected


@pytest.fixture(scope="module")
def stage(module_lab: Lab) -> Stage:
    return Stage(module_lab)


@pytest.fixture(autouse=True)
def next_round(stage: Stage) -> Iterator[None]:
    stage.publish()
    yield
    stage.send_away()


INSTEAD = {"signature", "round", "malformed", "version", "flood", "too-large"}
"""Lies that cost the whole message, so that another peer is asked in the liar's place."""


@pytest.mark.parametrize("reason", LIES)
def test_lie_is_caught_and_another_peer_is_drawn(stage: Stage, reason: str) -> None:
    liar = stage.bring(LIES[reason])
    stage.set(peers_per_round=2 if reason == "duplicate" else 1)
    before = stage.asker.status().rejected.get(reason, 0)
    collected = stage.asker.collect(stage.round, 100)
    if reason in INSTEAD:
        assert {g.peer_id for g in collected.groups} == {stage.honest.status().peer_id}
    assert set(collected.rejected) == {reason}
    status = stage.asker.status()
    assert status.rejected[reason] == before + collected.rejected[reason]
    assert status.rejected_by_peer[liar.context.identity.peer_id] == collected.rejected[reason]


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (lie_with_bomb, "too-large"),
        (lie_with_bomb_of_objects, "malformed"),
        (lie_with_size, "too-large"),
        (lie_with_wrong_kind, "malformed"),
    ],
)
def test_hostile_message_costs_only_its_sender(stage: Stage, lie: Lie, reason: str) -> None:
    stage.set(peers_per_round=1)
    stage.bring(lie)
    assert stage.collect() == {reason: 1}


@pytest.mark.parametrize(
    ("reason", "over"),
    [("too-long", ("x" * 20_000, "y")), ("num-completions", ("x",) * (GROUP_SIZE + 1))],
)
def test_group_over_the_limits_is_dropped_and_the_others_are_taken(
    stage: Stage, reason: str, over: tuple[str, ...]
) -> None:
    stage.set(peers_per_round=2)
    liar = stage.bring(
        send_groups(lambda groups, _, __: [replace(groups[0], completions=over), *groups[1:]])
    )
    collected = stage.asker.collect(stage.round, 100)
    assert collected.rejected == {reason: 1}
    assert sum(g.peer_id == liar.context.identity.peer_id for g in collected.groups) == 8


@pytest.mark.parametrize("lie", [end_in_the_middle, say_nothing, promise, trickle])
def test_slow_or_broken_peer_is_replaced(stage: Stage, lie: Lie) -> None:
    stage.set(peers_per_round=1)
    liar = stage.bring(lie)
    assert stage.collect() == {}
    heard = liar.context.identity.peer_id in stage.asker.status().peers_heard
    assert heard == (lie in (promise, trickle))


def test_sender_that_keeps_lying_is_no_longer_asked(stage: Stage) -> None:
    asked = []

    async def lie(me: Identity, ask: Ask, stream: Stream) -> None:
        asked.append(ask.round)
        await lie_with_replay(me, ask, stream)

    stage.set(peers_per_round=1)
    stage.bring(lie)
    first = stage.round
    for _ in range(5):
        stage.collect()
        stage.publish()
    assert asked == [first, first + 1]


def test_task_that_only_the_sender_knows_is_dropped_without_blame(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def question(task: Task) -> str:
        if task.family == "poetry":
            raise BadRecord("unknown-task", "poetry: not in this node's mix")
        return "?"

    monkeypatch.setattr(stage.asker._verifier._tasks, "question", question)
    stage.set(peers_per_round=2)
    liar = stage.bring(change_task(family="poetry"))
    for _ in range(3):
        collected = stage.asker.collect(stage.round, 100)
        assert collected.rejected == {"unknown-task": 9}
        assert len(collected.groups) == 9
    assert not stage.asker._context.peers.is_quarantined(liar.context.identity.peer_id)


def test_scorer_that_hangs_on_one_sender_leaves_time_for_the_others(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.collect()  # shows how long others' groups take
    stage.publish()
    score, slow_seeds = stage.asker._verifier._tasks.score, set()

    def slow_score(task: Task, completions: Sequence[str]) -> list[float]:
        if task.seed in slow_seeds:
            time.sleep(6)
        return score(task, completions)

    monkeypatch.setattr(stage.asker._verifier._tasks, "score", slow_score)
    stage.set(peers_per_round=1, collect_timeout_seconds=4.0)
    liar = stage.bring(send_groups(lambda groups, _, __: groups[:1]))
    slow_seeds.add(round_seed(liar.context.identity.peer_id, stage.round))
    try:
        assert stage.collect() == {"slow-to-score": 1}
    finally:
        stage.set(collect_timeout_seconds=6.0)
