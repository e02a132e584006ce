"""Failures of a node's own network part: a hanging event loop, parts that die."""

import asyncio
import gc
import time
from uuid import uuid4

import pytest
from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
from hivemind.proto import p2pd_pb2
from swarm_lab import Lab, make_groups, wait_until

from worker.errors import SwarmError
from worker.records import Collected
from worker.swarm import swarm as swarm_module
from worker.swarm.discovery import discovery
from worker.swarm.swarm import MAX_ROUNDS_UNANSWERED, Swarm


def pair(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> tuple[Swarm, Swarm]:
    monkeypatch.setattr(swarm_module, "LOOP_PATIENCE_SECONDS", 0.2)
    lab.bootnode()
    one, other = lab.peer("one", collect_timeout_seconds=4.0), lab.peer("other")
    wait_until(lambda: one.status().peers_known == 1, 15, "they know each other")
    other.publish(1, make_groups(other.status().peer_id, 1))
    return one, other


def test_round_that_the_event_loop_does_not_answer_is_a_round_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, _ = pair(lab, monkeypatch)
    one._network.post(time.sleep, 7)
    one.publish(1, make_groups(one.status().peer_id, 1))
    assert one.collect(1, 9) == Collected()
    status = one.status()
    assert (status.state, status.rounds_unanswered) == ("training-alone", 1)
    assert "did not answer within 4.2 s; it is busy at" in str(status.last_error)
    assert "training this round alone round=1" in caplog.text

    wait_until(lambda: len(one.collect(1, 9).groups) == 9, 10, "it answers again")
    assert one.status().state == "connected"


def test_event_loop_that_never_answers_ends_the_node(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(round: int, want: int) -> Collected:
        await asyncio.sleep(60)
        return Collected()

    swarm = lab.peer("one", collect_timeout_seconds=0.1)
    monkeypatch.setattr(swarm_module, "LOOP_PATIENCE_SECONDS", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(swarm, "_collect", hang)
        for round in range(1, MAX_ROUNDS_UNANSWERED):
            assert swarm.collect(round, 9) == Collected()
        with pytest.raises(SwarmError, match=f"{MAX_ROUNDS_UNANSWERED} rounds in a row"):
            swarm.collect(MAX_ROUNDS_UNANSWERED, 9)


def test_session_that_is_cancelled_from_within_is_started_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cancelled(self: discovery.DiscoveryLoop) -> None:
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(discovery.DiscoveryLoop, "run", cancelled)
        swarm = lab.peer("one")
        wait_until(lambda: swarm.status().daemon_restarts > 0, 20, "it is started again")
    wait_until(lambda: swarm._context.is_up, 20, "it is up")
    assert swarm.status().last_error == "a task was cancelled"


def test_death_of_the_reader_of_the_dht_is_noticed_and_mended(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def kill_reader() -> None:
        """As it dies in earnest: an answer comes to a question that was given up."""
        control = next(c for c in gc.get_objects() if type(c) is ControlClient and is_here(c))
        call, given_up = uuid4(), asyncio.get_running_loop().create_future()
        given_up.cancel()
        control._pending_calls[call] = given_up
        await control._pending_messages.put(
            p2pd_pb2.PersistentConnectionRequest(
                callId=call.bytes,
                removeUnaryHandler=p2pd_pb2.RemoveUnaryHandlerRequest(proto="none"),
            )
        )

    def is_here(control: ControlClient) -> bool:
        return (
            control._read_task is not None
            and control._read_task.get_loop() is asyncio.get_running_loop()
        )

    one, _ = pair(lab, monkeypatch)
    one._network.call(kill_reader(), 5)
    wait_until(lambda: one.status().daemon_restarts == 1, 10, "the network is started again")
    assert "InvalidStateError" in str(one.status().last_error)
    wait_until(lambda: len(one.collect(1, 9).groups) == 9, 20, "groups come again")
