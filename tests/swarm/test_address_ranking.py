"""Addresses that are shown to peers: the eight most useful, in order, and none of containers."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from worker.swarm.transport import address_ranking
from worker.swarm.transport.address_ranking import inner_hosts, ranked

RELAYED = "/ip4/203.0.113.9/tcp/38000/p2p/QmRelay/p2p-circuit"
PUBLIC, PRIVATE, TAILNET = "/ip4/198.51.99.7/tcp/1", "/ip4/10.0.0.5/tcp/1", "/ip4/100.64.3.2/tcp/1"
BRIDGES = [f"/ip4/172.{n}.0.1/tcp/1" for n in range(17, 26)]
LOOPBACK, LINK_LOCAL = "/ip4/127.0.0.1/tcp/1", "/ip6/fe80::1/tcp/1"


def test_nine_bridges_do_not_crowd_out_what_helps():
    inner = frozenset(address.split("/")[2] for address in BRIDGES)
    given = [LOOPBACK, *BRIDGES, PRIVATE, TAILNET, LINK_LOCAL, RELAYED, PUBLIC]
    assert ranked(given, inner) == (PUBLIC, RELAYED, PRIVATE, TAILNET, LINK_LOCAL, LOOPBACK)
    assert ranked(given)[:2] == (PUBLIC, RELAYED)  # also where bridges can't be told from others


def test_names_count_as_public():
    assert ranked([PRIVATE, "/dns/node.example.org/tcp/1"])[0] == "/dns/node.example.org/tcp/1"


def test_machine_that_has_nothing_else_keeps_its_bridge():
    assert ranked([LOOPBACK, BRIDGES[0]], frozenset({"172.17.0.1"})) == (BRIDGES[0], LOOPBACK)


@pytest.fixture
def interfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of sysfs: docker0 with a container's port, vmbr0 with a network card."""
    for name in (
        "docker0/bridge",
        "docker0/brif/veth1",
        "veth1",
        "vmbr0/bridge",
        "vmbr0/brif/eth0",
        "eth0/device",
    ):
        (tmp_path / name).mkdir(parents=True)
    hosts = {"docker0": "172.17.0.1", "vmbr0": "192.168.1.2", "eth0": "10.0.0.5"}
    monkeypatch.setattr(address_ranking, "interface_address", hosts.get)
    return tmp_path


def test_bridge_without_a_card_leads_nowhere(interfaces):
    assert inner_hosts(interfaces) == {"172.17.0.1"}


def test_machine_without_sysfs_has_no_known_bridges(tmp_path):
    assert inner_hosts(tmp_path / "missing") == frozenset()


_ADDRESSES = st.sampled_from(
    [
        *(RELAYED, PUBLIC, PRIVATE, TAILNET, LOOPBACK, LINK_LOCAL, *BRIDGES[:2]),
        *("/dns4/a.example/tcp/1", "/ip4/999.1.1.1/tcp/1", "/ip6/::1/tcp/1", "nonsense", ""),
    ]
)


@hypothesis_settings(max_examples=60, deadline=None, database=None)
@given(addresses=st.lists(_ADDRESSES, max_size=9), data=st.data())
def test_order_does_not_depend_on_that_of_the_addresses(
    addresses: list[str], data: st.DataObject
) -> None:
    inner = frozenset({"172.17.0.1"})
    found = ranked(addresses, inner)
    assert found == ranked(data.draw(st.permutations(addresses)), inner)
    assert ranked(found, inner) == found
    assert len(set(found)) == len(found)
    left_out = set(addresses) - set(found)
    assert left_out <= {BRIDGES[0]}
    if left_out:
        assert set(found) - {LOOPBACK, "/ip6/::1/tcp/1"}
    kinds = [
        address for address in (PUBLIC, RELAYED, PRIVATE, LINK_LOCAL, LOOPBACK) if address in found
    ]
    assert sorted(kinds, key=found.index) == kinds
