"""Addresses of relays: which ones p2pd takes, in which form, and which of them are worth naming."""

import asyncio
import socket

import pytest

from worker.swarm.transport import daemon, relays

PEER = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
OTHER = "QmT78zSuBmuS4z925WZfrqQ1qHaJ56DQaTfyMUF7F8ff5o"


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/ip4/192.0.2.1/tcp/4001",
        f"/ip4/999.0.2.1/tcp/4001/p2p/{PEER}",
        f"/ip4/192.0.2.1/tcp/99999/p2p/{PEER}",
        f"/ip4/192.0.2.1/udp/4001/quic-v1/p2p/{PEER}",
        f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER[:-1]}0",
        f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER[:-3]}",
        f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER},/ip4/192.0.2.1/tcp/4002/p2p/{PEER}",
        f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}/p2p-circuit",
        f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}\n",
        f"/dns4/a b/tcp/1/p2p/{PEER}",
        f"/unix/x/tcp/1/p2p/{PEER}",
        "\x1b[2J",
    ],
)
def test_address_that_would_end_the_daemon_is_left_out(address: str) -> None:
    assert not relays.is_dialable(address)
    assert asyncio.run(relays.find([address])) == []


@pytest.mark.parametrize(
    "place", ["/ip4/192.0.2.1", "/ip6/2001:db8::1", "/dns4/boot.example.org", "/dns/localhost"]
)
def test_address_of_a_peer_is_taken(place: str) -> None:
    assert relays.is_dialable(f"{place}/tcp/4001/p2p/{PEER}")


def test_one_address_of_each_relay_that_answers_is_named() -> None:
    with socket.socket() as one, socket.socket() as closed:
        for listener in (one, closed):
            listener.bind(("127.0.0.1", 0))
        one.listen()
        port, dead = one.getsockname()[1], closed.getsockname()[1]
        answers = f"/ip4/127.0.0.1/tcp/{port}/p2p/{PEER}"
        silent = f"/ip4/127.0.0.1/tcp/{dead}/p2p/{OTHER}"
        known = [
            f"/ip4/127.0.0.1/tcp/{dead}/p2p/{PEER}",
            answers,
            f"/dns/localhost/tcp/{port}/p2p/{PEER}",
            silent,
        ]
        assert asyncio.run(relays.find(known)) == [answers]
        assert asyncio.run(relays.find([silent])) == [silent]


def test_address_at_a_relay_is_written_as_libp2p_does() -> None:
    peer = daemon._peer_bytes(PEER)
    expected = b"\x04\x0a\x00\x00\x01\x06\x0f\xa1" + b"\xa5\x03\x22" + peer + b"\xa2\x02"
    assert daemon._address_bytes(
        [f"/ip4/10.0.0.1/tcp/4001/p2p/{PEER}/p2p-circuit", "/ip4/1/tcp/1"]
    ) == [expected]
