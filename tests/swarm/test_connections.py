"""Streams over the daemon: when a peer is dialled again, and when a connection is given up."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from worker.errors import SwarmError
from worker.swarm.transport.connections import Connections
from worker.swarm.transport.daemon import Daemon

NEWEST = ("/ip4/127.0.0.1/tcp/1",)


class Writer:
    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class FakeDaemon(Daemon):
    """A daemon with a script: each opened stream is the next of `opens`, or raises it."""

    def __init__(self, *opens: Exception | Writer, met: Sequence[str] = ()) -> None:
        self.opens = list(opens)
        self.met = set(met)
        self.dialled: list[tuple[str, tuple[str, ...]]] = []
        self.dropped: list[str] = []

    def has_met(self, peer_id: str) -> bool:
        return peer_id in self.met

    async def open_stream(self, peer_id: str, protocol: str, timeout: float) -> Any:
        found = self.opens.pop(0)
        if isinstance(found, Exception):
            raise found
        return asyncio.StreamReader(), found

    async def connect(self, peer_id: str, addresses: Sequence[str], timeout: float) -> None:
        self.dialled.append((peer_id, tuple(addresses)))

    async def disconnect(self, peer_id: str) -> None:
        self.dropped.append(peer_id)


def connections(daemon: Daemon | None) -> Connections:
    made = Connections(lambda peer_id: NEWEST, Counter())
    made.daemon = daemon
    return made


Body = Callable[[], Coroutine[Any, Any, None]]


def use(streams: Connections, body: Body | None = None, addresses: Sequence[str] = ()) -> None:
    """Open one stream to peer "a", and run `body` in it."""

    async def run() -> None:
        async with streams.stream("a", addresses):
            if body is not None:
                await body()

    asyncio.run(run())


def test_peer_that_is_connected_is_not_dialled() -> None:
    writer = Writer()
    daemon = FakeDaemon(writer, met=["a"])
    use(connections(daemon))
    assert (daemon.dialled, writer.is_closed) == ([], True)


@pytest.mark.parametrize(("given", "used"), [((), NEWEST), (("/dns/b/tcp/2",), ("/dns/b/tcp/2",))])
def test_new_peer_is_dialled_at_its_newest_or_the_given_addresses(
    given: Sequence[str], used: Sequence[str]
) -> None:
    daemon = FakeDaemon(Writer())
    use(connections(daemon), addresses=given)
    assert daemon.dialled == [("a", used)]


def test_dead_connection_is_replaced_by_a_new_one() -> None:
    daemon = FakeDaemon(SwarmError("stream reset"), Writer(), met=["a"])
    use(connections(daemon))
    assert (daemon.dialled, daemon.dropped) == ([("a", NEWEST)], [])


def test_peer_that_gives_no_stream_is_disconnected() -> None:
    daemon = FakeDaemon(TimeoutError(), met=["a"])
    with pytest.raises(TimeoutError):
        use(connections(daemon))
    assert daemon.dropped == ["a"]


async def time_out() -> None:
    raise TimeoutError


def test_peer_that_is_silent_in_a_stream_is_disconnected() -> None:
    daemon = FakeDaemon(writer := Writer(), met=["a"])
    streams = connections(daemon)
    with pytest.raises(TimeoutError):
        use(streams, time_out)
    assert (daemon.dropped, writer.is_closed) == (["a"], True)
    assert not streams.is_talking_with("a")


def test_peer_that_is_silent_in_one_stream_keeps_the_others() -> None:
    daemon = FakeDaemon(Writer(), Writer(), met=["a"])
    streams = connections(daemon)

    async def run() -> None:
        async with streams.stream("a"):
            with pytest.raises(TimeoutError):
                async with streams.stream("a"):
                    raise TimeoutError
            assert streams.is_talking_with("a")

    asyncio.run(run())
    assert daemon.dropped == []


def test_stream_that_the_peer_opened_counts_as_talking() -> None:
    streams = connections(None)
    with streams.admission.admitted("a"):
        assert streams.is_talking_with("a")
        assert not streams.is_talking_with("b")
    assert not streams.is_talking_with("a")


def test_other_errors_do_not_disconnect() -> None:
    daemon = FakeDaemon(Writer(), met=["a"])

    async def fail() -> None:
        raise EOFError("the peer closed")

    with pytest.raises(EOFError):
        use(connections(daemon), fail)
    assert daemon.dropped == []


def test_without_a_daemon_no_stream() -> None:
    with pytest.raises(SwarmError, match="libp2p daemon is not running"):
        use(connections(None))
