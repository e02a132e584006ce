"""Answers to peers' requests, over in-memory streams: greetings, refusals and their reasons."""

import asyncio
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from worker import settings
from worker.swarm import identity
from worker.swarm.context import SwarmContext
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Kind, Member, Refused
from worker.swarm.requests import Requests
from worker.swarm.transport import streams
from worker.swarm.transport.connections import Connections
from worker.swarm.transport.streams import MAX_STREAMS_PER_PEER


class Writer:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.sent = bytearray()

    def write(self, data: bytes) -> None:
        self.sent += data

    async def drain(self) -> None:
        pass


@dataclass
class Peer:
    """A node with an identity, and what it shows of itself."""

    peer_id: str
    member: Member


@pytest.fixture(autouse=True)
def _no_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LINGER_SECONDS", 0.01)


def make_context(folder: Path, **options: Any) -> SwarmContext:
    identity.create(folder / "swarm.pem")
    context = SwarmContext(settings.Swarm(), folder / "swarm.pem", folder, **options)
    context.addresses = ("/ip4/127.0.0.1/tcp/1",)
    return context


@pytest.fixture
def context(tmp_path: Path) -> SwarmContext:
    return make_context(tmp_path / "own")


@pytest.fixture
def peer(tmp_path: Path) -> Peer:
    other = make_context(tmp_path / "peer")
    other.addresses = ("/ip4/127.0.0.1/tcp/2",)
    return Peer(other.identity.peer_id, other.member())


def answer(requests: Requests, peer_id: str, request: bytes) -> tuple[Kind, bytes]:
    """Let a peer make a request; return the kind and the content of the answer."""

    async def run() -> tuple[Kind, bytes]:
        reader, back, writer = asyncio.StreamReader(), asyncio.StreamReader(), Writer()
        reader.feed_data(request)
        reader.feed_eof()
        await requests.serve(peer_id, reader, writer)  # type: ignore[arg-type]
        back.feed_data(bytes(writer.sent))
        back.feed_eof()
        return await messages.read_frame(back, messages.MAX_FRAME_BYTES)

    return asyncio.run(run())


def serving(context: SwarmContext, **handlers: Any) -> Requests:
    connections = Connections(lambda peer_id: (), Counter())
    handlers = {"on_ask": None, "on_audit": None} | handlers
    return Requests(context, connections, **handlers)


def reason_of(requests: Requests, peer_id: str, request: bytes) -> str:
    with pytest.raises(Refused) as caught:
        answer(requests, peer_id, request)
    return caught.value.reason


def test_greeting_is_answered_with_our_record_and_remembered(
    context: SwarmContext, peer: Peer
) -> None:
    kind, payload = answer(
        serving(context), peer.peer_id, messages.encode_frame(Kind.HELLO, peer.member.sealed)
    )
    assert kind is Kind.PEERS
    (own,) = messages.decode_peers(payload)
    assert messages.open_member(own).peer_id == context.identity.peer_id
    assert context.peers.addresses(peer.peer_id) == peer.member.addresses
    assert context.has_contact


def test_node_that_is_no_member_does_not_show_itself(tmp_path: Path, peer: Peer) -> None:
    context = make_context(tmp_path / "bootnode", is_member=False)
    _, payload = answer(
        serving(context), peer.peer_id, messages.encode_frame(Kind.HELLO, peer.member.sealed)
    )
    assert messages.decode_peers(payload) == []


def test_greeting_without_a_record_is_answered_but_is_no_contact(context: SwarmContext) -> None:
    kind, _ = answer(serving(context), "12D3KooWauditor", messages.encode_frame(Kind.HELLO, b""))
    assert kind is Kind.PEERS
    assert context.has_contact is None


def test_record_of_another_peer_is_refused(context: SwarmContext, peer: Peer) -> None:
    hello = messages.encode_frame(Kind.HELLO, peer.member.sealed)
    assert reason_of(serving(context), "12D3KooWliar", hello) == "sender"
    assert context.refused == {"sender": 1}


@pytest.mark.parametrize("kind", [Kind.ASK, Kind.AUDIT])
def test_request_without_a_handler_is_refused(context: SwarmContext, kind: Kind) -> None:
    requests = serving(context)
    assert reason_of(requests, "12D3KooWpeer", messages.encode_frame(kind, b"")) == "malformed"


def test_noise_is_refused(context: SwarmContext) -> None:
    assert reason_of(serving(context), "12D3KooWpeer", b"GET / HTTP/1.1\r\n\r\n") in (
        "malformed",
        "version",
        "oversized",
    )


def test_peer_with_too_many_open_streams_is_refused(context: SwarmContext, peer: Peer) -> None:
    requests = serving(context)
    admission = requests._connections.admission
    admission._open[peer.peer_id] = MAX_STREAMS_PER_PEER
    hello = messages.encode_frame(Kind.HELLO, peer.member.sealed)
    assert reason_of(requests, peer.peer_id, hello) == "flood"
    admission._open[peer.peer_id] -= 1
    assert answer(requests, peer.peer_id, hello)[0] is Kind.PEERS


def test_peer_that_hangs_up_early_harms_nothing(context: SwarmContext) -> None:
    requests = serving(context)

    async def run() -> Writer:
        reader, writer = asyncio.StreamReader(), Writer()
        reader.feed_eof()
        await requests.serve("12D3KooWpeer", reader, writer)  # type: ignore[arg-type]
        return writer

    assert asyncio.run(run()).sent == b""
    assert context.refused == {}
    assert not requests._connections.admission.has_open("12D3KooWpeer")
