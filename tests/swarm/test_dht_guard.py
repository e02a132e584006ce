"""Limits on DHT requests: hostile and newer requests are refused with a reason, floods limited."""

import asyncio

import pytest
from swarm_lab import Lab, encode_ask, make_groups, wait_until

from worker.swarm.network import Network
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Kind, Refused
from worker.swarm.swarm import Swarm
from worker.swarm.transport.streams import (
    MAX_REQUESTS_PER_PEER,
    MAX_STREAMS,
    MAX_STREAMS_PER_PEER,
    Admission,
)


@pytest.fixture(scope="module")
def server(module_lab: Lab) -> Swarm:
    module_lab.bootnode()
    server = module_lab.peer("server")
    server.publish(1, make_groups(server.status().peer_id, 1))
    return server


@pytest.fixture(scope="module")
def outsider(module_lab: Lab, server: Swarm) -> Network:
    return bring_outsider(module_lab, "outsider")


def bring_outsider(lab: Lab, name: str, **options: object) -> Network:
    outsider = lab.network(name, **options)
    wait_until(lambda: len(outsider.context.peers) >= 1, 15, "the outsider knows the server")
    return outsider


def ask(outsider: Network, server: Swarm, request: bytes) -> tuple[Kind, bytes]:
    """Send raw bytes to the server; its first frame, or the exception that it is."""

    async def converse() -> tuple[Kind, bytes]:
        async with (
            outsider.connections.stream(server.status().peer_id) as stream,
            asyncio.timeout(10),
        ):
            await stream.send(request)
            return await stream.receive(messages.MAX_FRAME_BYTES)

    return outsider.call(converse(), 15)


def newer(frame: bytes) -> bytes:
    return frame[:2] + bytes([messages.VERSION + 1]) + frame[3:]


@pytest.mark.parametrize(
    ("reason", "request_bytes"),
    [
        ("version", newer(messages.encode_frame(Kind.HELLO, b""))),
        ("malformed", b"GET / HTTP/1.1\r\n\r\n"),
        ("malformed", messages.encode_frame(Kind.HELLO, b"no record")),
        ("malformed", encode_ask(1, 5, b"")),
        ("malformed", messages.encode_frame(Kind.GROUPS, b"")),
        ("malformed", messages.encode_frame(Kind.ASK, b"\x93" * 2000)),
        ("too-large", messages.encode_frame(Kind.ASK, b"x" * 10_000_000)),
    ],
    ids=["newer", "http", "no-record", "anonymous", "wrong-kind", "nested", "10MB"],
)
def test_bad_request_is_refused_with_a_reason(
    server: Swarm, outsider: Network, reason: str, request_bytes: bytes
) -> None:
    with pytest.raises(Refused) as caught:
        ask(outsider, server, request_bytes)
    assert caught.value.reason == reason


def test_newer_version_is_named_on_both_sides(
    server: Swarm, outsider: Network, caplog: pytest.LogCaptureFixture
) -> None:
    server._context.peers._versions.clear()
    with pytest.raises(
        Refused, match="version 5; this node speaks 4, upgrade the older of the two"
    ):
        ask(outsider, server, newer(messages.encode_frame(Kind.HELLO, b"")))
    assert server.status().other_versions == {"exchange 5": 1}
    assert (
        f"peer={outsider.context.identity.peer_id} theirs=5 ours=4: upgrade the older of the two"
        in caplog.text
    )
    assert server.status().requests_refused["version"] > 0


def test_record_of_somebody_else_is_refused(server: Swarm, outsider: Network) -> None:
    theirs = server._context.member().sealed
    with pytest.raises(Refused, match="another peer as its own") as caught:
        ask(outsider, server, encode_ask(1, 5, theirs))
    assert caught.value.reason == "sender"


def test_request_for_groups_that_are_ready_is_answered_by_them_at_once(
    module_lab: Lab, server: Swarm
) -> None:
    asker = bring_outsider(module_lab, "asker", environments=("sums 1",))
    kind, payload = ask(asker, server, encode_ask(1, 5, asker.context.member().sealed))
    assert kind is Kind.GROUPS
    limits = server._verifier.limits
    assert len(messages.open_groups(payload, server.status().peer_id, 1, limits)) == 9


def test_own_record_is_signed_once_however_often_it_is_shown(outsider: Network) -> None:
    async def show() -> set[bytes]:
        shown = set()
        for outsider.context.newest_round in (5, 6, 7):  # three rounds within a second
            shown = {outsider.context.member().sealed for _ in range(5)}
        return shown

    assert len(outsider.call(show(), 5)) == 1


def test_flood_is_limited_and_others_are_served(module_lab: Lab, server: Swarm) -> None:
    refusals, flooder = [], bring_outsider(module_lab, "flooder")
    hello = messages.encode_frame(Kind.HELLO, flooder.context.member().sealed)
    for _ in range(MAX_REQUESTS_PER_PEER + 10):
        try:
            ask(flooder, server, hello)
        except Refused as refusal:
            refusals.append(refusal.reason)
    assert len(refusals) >= 10
    assert set(refusals) == {"flood"}
    other = bring_outsider(module_lab, "polite")
    assert (
        ask(other, server, messages.encode_frame(Kind.HELLO, other.context.member().sealed))[0]
        is Kind.PEERS
    )


def test_request_that_never_comes_is_given_up(server: Swarm, outsider: Network) -> None:
    with pytest.raises((EOFError, OSError)):
        ask(outsider, server, b"hw\x01")
    wait_until(
        lambda: not server._network.connections.admission._open,
        10,
        "the server has no open streams",
    )


def test_admission_counts_all_and_each() -> None:
    admission = Admission()
    with (
        admission.admitted("a"),
        admission.admitted("a"),
        admission.admitted("a"),
        admission.admitted("a"),
    ):
        assert MAX_STREAMS_PER_PEER == 4
        refusal = admission.refusal("a")
        assert refusal is not None
        assert refusal[0] == "flood"
        assert admission.refusal("b") is None
    assert admission.refusal("a") is None
    for i in range(MAX_STREAMS):
        admission._open[f"peer{i}"] = 1
    refusal = admission.refusal("b")
    assert refusal is not None
    assert refusal[0] == "full"
