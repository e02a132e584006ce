"""Peer ids and addresses: one syntax for settings, messages and the account service."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


HOSTS = st.sampled_from(["192.0.2.1", "a.example", "::1", "node_1"])
PROTOCOLS = st.sampled_from(["ip4", "ip6", "dns", "dns4", "dns6"])


@given(PROTOCOLS, HOSTS, st.sampled_from(["tcp", "udp"]), st.integers(0, 99999))
def test_address_with_a_peer_is_taken_apart_again(protocol, host, transport, port):
    address = f"/{protocol}/{host}/{transport}/{port}"
    assert multiaddr.is_address(address)
    assert multiaddr.split_peer(f"{address}/p2p/{PEER}") == (address, PEER)


@given(st.text(max_size=80))
def test_no_text_breaks_the_readers(text):
    assert not (multiaddr.is_address(text) and not text.startswith("/"))
    address, peer = multiaddr.split_peer(text)
    assert peer == text or f"{address}/p2p/{peer}" == text
    found = multiaddr.match_tcp_peer(text)
    assert found is None or text.endswith(found[2])
    assert multiaddr.is_recorded_id(text)


@pytest.mark.parametrize(("length", "is_recorded"), [(0, True), (512, True), (513, False)])
def test_ids_in_the_log_of_a_foreign_contract_are_bounded(length, is_recorded):
    assert multiaddr.is_recorded_id("x" * length) == is_recorded


@pytest.mark.parametrize("hidden", ["\n", "\0", " ", "\u202e", "é"])
def test_character_that_no_address_has_is_refused(hidden):
    assert not multiaddr.is_address(f"/ip4/192.0.2.1{hidden}/tcp/1")
    assert not multiaddr.is_address(f"/ip4/192.0.2.1/tcp/1{hidden}")
    assert multiaddr.match_tcp_peer(f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}{hidden}") is None
