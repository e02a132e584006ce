"""Peer ids and addresses: one syntax for settings, messages and the account service."""

import pytest

from worker import multiaddr

PEER = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


@pytest.mark.parametrize(
    ("text", "is_peer"),
    [
        (PEER, True),
        ("1" * 16, True),
        ("1" * 64, True),
        ("1" * 15, False),
        ("1" * 65, False),
        (PEER + "\n", False),
        (PEER[:-1] + "0", False),
        (PEER[:-1] + "l", False),
        ("", False),
    ],
)
def test_peer_ids_are_base58_of_16_to_64_characters(text, is_peer):
    assert multiaddr.is_peer_id(text) is is_peer


@pytest.mark.parametrize(
    ("text", "is_address"),
    [
        ("/ip4/192.0.2.1/tcp/38000", True),
        ("/dns/a.example/udp/1/quic", True),
        ("/ip6/::1/tcp/1", True),
        (f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}/p2p-circuit", True),
        ("ip4/192.0.2.1/tcp/1", False),
        ("/ip4/192.0.2.1", False),
        ("/ip4/1/tcp/1" + "/a" * 123, False),
        ("/ip4/1/tcp/1" + "/a" * 122, True),
    ],
)
def test_addresses_begin_with_a_host_and_a_port_and_are_bounded(text, is_address):
    assert multiaddr.is_address(text) is is_address


def test_address_is_split_from_the_peer_at_its_end():
    assert multiaddr.split_peer(f"/ip4/1/tcp/1/p2p/{PEER}") == ("/ip4/1/tcp/1", PEER)
    relayed = f"/ip4/1/tcp/1/p2p/{PEER}/p2p-circuit"
    assert multiaddr.split_peer(f"{relayed}/p2p/{PEER}") == (relayed, PEER)
    assert multiaddr.split_peer("/ip4/1/tcp/1")[0] == ""


def test_direct_tcp_addresses_of_rsa_peers_are_taken_apart():
    assert multiaddr.match_tcp_peer(f"/dns4/a.example/tcp/38000/p2p/{PEER}") == (
        "a.example",
        38000,
        PEER,
    )
    for other in (
        f"/ip4/1/udp/1/p2p/{PEER}",
        "/ip4/1/tcp/1",
        f"/ip4/1/tcp/1/p2p/{PEER}x",
        f"/ip4/1/tcp/1/p2p/12D{PEER[3:]}",
    ):
        assert multiaddr.match_tcp_peer(other) is None
