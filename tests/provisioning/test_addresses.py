"""Addresses of hosts in an inventory, and whether other hosts can reach them."""

import pytest

from deploys.inventory.addresses import (
    bootnode_announce,
    is_address,
    is_reachable,
    is_ssh_host,
)


@pytest.mark.parametrize(
    "host", ["gpu-1", "gpu-1.lan", "10.0.0.7", "fd00::7", "b\u00fccher.example"]
)
def test_names_and_addresses_are_hosts_of_ssh(host: str) -> None:
    assert is_ssh_host(host)


@pytest.mark.parametrize("host", ["", "gpu-1:22", "root@gpu-1", "gpu 1", "a" * 70, "-o Proxy", "."])
def test_other_texts_are_not(host: str) -> None:
    assert not is_ssh_host(host)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("10.0.0.7", True), ("::1", True), ("gpu-1", False), ("10.0.0", False), (None, False)],
)
def test_texts_of_ip_addresses(value: object, expected: bool) -> None:
    assert is_address(value) is expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("10.0.0.7", True),
        ("gpu-1", True),
        ("fd00::7", True),
        ("localhost", False),
        ("127.0.0.1", False),
        ("127.8.0.1", False),
        ("::1", False),
        ("0.0.0.0", False),
        ("::", False),
    ],
)
def test_loopback_and_any_address_are_out_of_reach(host: str, expected: bool) -> None:
    assert is_reachable(host) is expected


@pytest.mark.parametrize(
    ("data", "address"),
    [
        ({"account_host": "10.0.0.7", "bootnode_port": 40}, "/ip4/10.0.0.7/tcp/40"),
        ({"account_host": "fd00::7", "bootnode_port": 40}, "/ip6/fd00::7/tcp/40"),
        ({"account_host": "hub.lan", "bootnode_port": 40}, "/dns/hub.lan/tcp/40"),
    ],
)
def test_bootnode_announces_the_account_service_s_host(
    data: dict[str, object], address: str
) -> None:
    assert bootnode_announce(data) == {"bootnode_announce": [address]}


@pytest.mark.parametrize(
    "data",
    [
        {"account_host": "10.0.0.7", "bootnode_port": 0},
        {"account_host": "127.0.0.1"},
        {},
        {"account_host": "10.0.0.7", "bootnode_announce": []},
    ],
)
def test_bootnode_announces_nothing_of_its_own(data: dict[str, object]) -> None:
    assert bootnode_announce(data) == {}
