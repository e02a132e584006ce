"""Relayed connections are renewed from time to time, while they are not in use."""

import asyncio
from collections import Counter

import pytest

from worker.errors import SwarmError
from worker.swarm.transport import hole_punching
from worker.swarm.transport.connections import Connections
from worker.swarm.transport.daemon import Daemon
from worker.swarm.transport.hole_punching import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    HolePunching,
)


class FakeDaemon(Daemon):
    """Connections by peer: whether they are direct. Those that are dropped come back relayed."""

    def __init__(self, **direct: bool) -> None:
        self.direct = direct
        self.dropped: list[str] = []
        self.is_gone = False

    async def connections(self) -> dict[str, bool]:
        return dict(self.direct)

    async def disconnect(self, peer_id: str) -> None:
        if self.is_gone:
            raise SwarmError("no such connection")
        self.dropped.append(peer_id)


class Punch:
    """Asks which relayed connections to renew, at a time that a test sets."""

    def __init__(self, daemon: FakeDaemon) -> None:
        self.now = 1000.0
        self.connections = Connections(lambda peer_id: (), Counter())
        self.punching = HolePunching(self.connections, daemon)

    def at(self, seconds: float, contacts: str = "abc") -> list[str]:
        self.now = 1000.0 + seconds
        return asyncio.run(self.punching.drop_relayed(contacts))


@pytest.fixture
def daemon() -> FakeDaemon:
    return FakeDaemon(a=False, b=True)


@pytest.fixture
def punch(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> Punch:
    punch = Punch(daemon)
    monkeypatch.setattr(hole_punching.time, "monotonic", lambda: punch.now)
    return punch


def test_relayed_connection_is_renewed_after_pauses_that_double(
    punch: Punch, daemon: FakeDaemon
) -> None:
    assert punch.at(0) == []
    assert punch.at(FIRST_PAUSE_SECONDS - 1) == []
    times, now, pause = [], FIRST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS
    while now < 4 * LONGEST_PAUSE_SECONDS:
        assert punch.at(now) == ["a"]
        times.append(now)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        assert punch.at(now + pause - 1) == []
        now += pause
    assert times[:4] == [5, 15, 35, 75]
    assert times[-1] - times[-2] == LONGEST_PAUSE_SECONDS
    assert set(daemon.dropped) == {"a"}


def test_direct_connections_and_those_of_others_stay(punch: Punch, daemon: FakeDaemon) -> None:
    punch.at(0, contacts="b")
    assert punch.at(1000, contacts="b") == []
    daemon.direct["a"] = True
    punch.at(1001)
    assert punch.at(9000) == []
    assert daemon.dropped == []


def test_connection_in_use_is_renewed_only_after_that(punch: Punch, daemon: FakeDaemon) -> None:
    punch.at(0)
    with punch.connections.admission.admitted("a"):
        assert punch.at(60) == []
    assert punch.at(61) == ["a"]


def test_peer_that_was_direct_meanwhile_begins_with_the_first_pause_again(
    punch: Punch, daemon: FakeDaemon
) -> None:
    punch.at(0)
    assert punch.at(5) == ["a"]
    daemon.direct["a"] = True
    punch.at(10)
    daemon.direct["a"] = False
    assert punch.at(100) == []
    assert punch.at(105) == ["a"]


def test_connection_that_is_gone_already_is_dialled_again(punch: Punch, daemon: FakeDaemon) -> None:
    punch.at(0)
    daemon.is_gone = True
    assert punch.at(5) == ["a"]
