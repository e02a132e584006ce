"""The WireGuard mesh: addresses and peers, mistakes in an inventory, keys that stay at home."""

import ipaddress
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deploys import mesh, operator
from deploys.facts import WireGuard
from deploys.inventory import validation
from deploys.inventory.host_plan import HostEntry
from deploys.inventory.schema import Deployment
from deploys.mesh import Member
from worker.errors import SettingsError

SUBNET = "10.86.0.0/16"


def members(**data: dict[str, Any]) -> dict[str, Member]:
    fleet = {name: Deployment(wireguard=True, **own) for name, own in data.items()}
    return mesh.members(
        fleet, {name: {"ssh_hostname": f"192.0.2.{n}"} for n, name in enumerate(fleet, 1)}
    )


def sections(
    of: Member, fleet: dict[str, Member], keys: dict[str, str] | None = None
) -> list[list[str]]:
    text = mesh.configuration(
        of, fleet.values(), {name: f"{name}=" for name in fleet} if keys is None else keys
    )
    return [section.strip().splitlines() for section in text.split("\n\n")]


def test_without_hub_everybody_is_everybodys_peer() -> None:
    fleet = members(
        a={"wireguard_address": "10.86.0.1"}, b={"wireguard_address": "10.86.0.2"}, c={}
    )
    interface, *peers = sections(fleet["b"], fleet)
    assert interface == [
        "[Interface]",
        "# Written by hivewright's deploy; the next one overwrites what is changed here.",
        "Address = 10.86.0.2/16",
        "ListenPort = 51820",
        "PostUp = wg set %i private-key /etc/wireguard/wg-hivewright.key",
    ]
    assert peers[0] == [
        "[Peer]",
        "# a",
        "PublicKey = a=",
        "AllowedIPs = 10.86.0.1/32",
        "Endpoint = 192.0.2.1:51820",
    ]
    assert peers[1][3:] == [f"AllowedIPs = {fleet['c'].address}/32", "Endpoint = 192.0.2.3:51820"]


def test_address_comes_from_the_name_and_other_hosts_change_nothing() -> None:
    alone, among = members(b={}), members(a={}, b={}, c={})
    assert alone["b"].address == among["b"].address
    assert alone["b"].address in ipaddress.ip_network(SUBNET)
    assert len({member.address for member in among.values()}) == 3
    wide = members(b={"wireguard_subnet": "fd86::/64"})["b"]
    assert wide.address in ipaddress.ip_network("fd86::/64")
    assert "Address = fd86::" in mesh.configuration(wide, [wide], {})


def test_host_behind_a_router_keeps_its_way_open_and_is_called_by_nobody() -> None:
    fleet = members(a={}, home={"wireguard_endpoint": "none"})
    (_, from_home), (_, to_home) = sections(fleet["home"], fleet), sections(fleet["a"], fleet)
    assert from_home[-1] == "PersistentKeepalive = 25"
    assert not any(line.startswith(("Endpoint", "Persistent")) for line in to_home)


def test_hubs_pass_on_what_goes_between_the_others() -> None:
    names = [f"gpu-{n}" for n in range(8)]
    fleet = members(
        hub1={"wireguard_hub": True}, hub2={"wireguard_hub": True}, **{name: {} for name in names}
    )
    for name in names:
        _, peer = sections(fleet[name], fleet)
        assert peer[1] in ("# hub1", "# hub2")
        assert peer[3] == f"AllowedIPs = {SUBNET}"
    of_hub = {hub: sections(fleet[hub], fleet) for hub in ("hub1", "hub2")}
    for hub, (interface, *peers) in of_hub.items():
        assert "PostUp = echo 1 > /proc/sys/net/ipv4/conf/%i/forwarding" in interface
        assert "PostUp = ip -4 rule add iif %i prohibit priority 8601" in interface
        routes = [
            route for peer in peers for route in peer[3].removeprefix("AllowedIPs = ").split(", ")
        ]
        others = [member.own_route for name, member in fleet.items() if name != hub]
        assert sorted(routes) == sorted(others), "every other host is behind exactly one peer"


def test_host_whose_key_is_not_known_yet_is_left_out() -> None:
    fleet = members(a={}, b={}, c={})
    assert [section[1] for section in sections(fleet["a"], fleet, {"c": "C="})[1:]] == ["# c"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"wireguard_subnet": "10.86.0.1/16"},
            (
                "wireguard_subnet: 10.86.0.1/16 has host bits set; expected a network, such as"
                " 10.86.0.0/16"
            ),
        ),
        (
            {"wireguard_subnet": "10.86.0.0/31"},
            (
                "wireguard_subnet: got '10.86.0.0/31', too small or too large; expected such as"
                " 10.86.0.0/16"
            ),
        ),
        (
            {"wireguard_address": "10.87.0.1"},
            "wireguard_address: got '10.87.0.1'; expected an address of a host in 10.86.0.0/16",
        ),
        (
            {"wireguard_address": "10.86.255.255"},
            "wireguard_address: got '10.86.255.255'; expected an address of a host in 10.86.0.0/16",
        ),
        (
            {"wireguard_endpoint": "192.0.2.7:51820"},
            (
                "wireguard_endpoint: got '192.0.2.7:51820'; expected a name or an address without a"
                " port, or 'none' behind a router"
            ),
        ),
        (
            {"wireguard_endpoint": "10.86.3.4"},
            (
                "wireguard_endpoint: got '10.86.3.4', which is in the mesh's own 10.86.0.0/16;"
                " expected its address outside of it"
            ),
        ),
        (
            {"ssh_hostname": "127.0.0.1"},
            (
                "wireguard_endpoint: none, and ssh_hostname: got '127.0.0.1'; expected a name or an"
                " address without a port, or 'none' behind a router"
            ),
        ),
        (
            {"wireguard_endpoint": "none", "wireguard_hub": True},
            "wireguard_endpoint: got 'none', and wireguard_hub; a hub is what the others reach",
        ),
        (
            {"wireguard_port": 70000},
            "wireguard_port: got 70000; expected less than or equal to 65535",
        ),
        ({"wireguard_prt": 1}, "wireguard_prt: not a known key; did you mean wireguard_port?"),
    ],
)
def test_wrong_keys_are_refused_before_any_host_is_touched(
    data: dict[str, Any], message: str
) -> None:
    own = {"slots": 1, "swarm_enabled": False, "wireguard": True, **data}
    with pytest.raises(SettingsError) as refused:
        validation.check([HostEntry("gpu-3", ("workers",), own, ("ssh_hostname",))])
    assert str(refused.value) == f"inventory data of gpu-3: {message}"


def test_hosts_that_do_not_go_together_are_named() -> None:
    def check(**fleet: dict[str, Any]) -> str:
        base = {"slots": 1, "swarm_enabled": False, "wireguard": True}
        with pytest.raises(SettingsError) as refused:
            validation.check(
                [HostEntry(name, ("workers",), base | own) for name, own in fleet.items()]
            )
        return str(refused.value)

    same = {"wireguard_address": "10.86.0.9"}
    assert (
        check(a=same, b=same)
        == "inventory data of b: wireguard_address: 10.86.0.9 is that of a too; give it another, or"
        " take a larger wireguard_subnet"
    )
    assert (
        check(a={"wireguard_endpoint": "none"}, b={"wireguard_endpoint": "none"}, c={})
        == "inventory data of a, b: wireguard_endpoint: got 'none', here and on other hosts, which"
        " then can't reach each other; make a host that all can reach their hub (wireguard_hub)"
    )
    assert "wireguard_subnet: got '10.86.0.0/16', and 10.9.0.0/16 elsewhere" in check(
        a={}, b={"wireguard_subnet": "10.9.0.0/16"}
    )


def test_configuration_reloads_with_its_key_and_only_public_keys_are_facts() -> None:
    assert (
        mesh.RELOAD.splitlines()[2]
        == 'ExecReload=/bin/sh -c \'{ printf "[Interface]\\\\nPrivateKey = "; cat'
        " /etc/wireguard/wg-hivewright.key; wg-quick strip %i | sed 1d; } | wg syncconf %i"
        " /dev/stdin'"
    )
    key = "a" * 43 + "="
    found = WireGuard().process([f"key={key}", "digest=1", "runs=yes"])
    assert (found.public_key, found.digest, found.runs, found.kernel) == (key, "1", True, False)
    assert WireGuard().process(["key=garbage"]).public_key is None
    assert not WireGuard().default().is_there
    bare = subprocess.run(
        ["sh", "-c", WireGuard().command()], capture_output=True, text=True, timeout=20, check=True
    )
    assert "key=" not in bare.stdout


def test_host_knows_its_peers_keys_itself(tmp_path: Path) -> None:
    """A run limited to it, from a machine without the record, must not disconnect it."""
    fleet = members(a={"wireguard_hub": True}, b={"wireguard_endpoint": "none"}, c={})
    file = tmp_path / "wg.conf"
    file.write_text(
        mesh.configuration(fleet["a"], fleet.values(), {name: f"{name}+/=" for name in fleet})
    )
    command = WireGuard().command().replace(str(mesh.CONFIGURATION), str(file))
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=20, check=True
    )
    found = WireGuard().process(done.stdout.splitlines())
    assert found.peers == {"b": "b+/=", "c": "c+/="}


def test_record_of_public_keys_grows_and_keeps_what_other_runs_wrote(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    assert operator.remember_public_keys(secrets, {"a": "A="}) == {"a": "A="}
    assert operator.remember_public_keys(secrets, {"b": "B="}) == {"a": "A=", "b": "B="}
    assert operator.remember_public_keys(secrets, {"a": "A2="}) == {"a": "A2=", "b": "B="}
    assert operator.public_keys(secrets) == {"a": "A2=", "b": "B="}
    assert json.loads((secrets / "wireguard.json").read_text()) == {"a": "A2=", "b": "B="}


def test_names_of_peers_may_have_spaces() -> None:
    """The names are those of the inventory; pyinfra takes any text."""
    key = "A" * 43 + "="
    found = WireGuard().process([f"peer=gpu one {key}", f"peer=a=b {key}", "kernel=yes"])
    assert found.peers == {"gpu one": key, "a=b": key}


def routes(of: Member, fleet: dict[str, Member]) -> dict[str, list[ipaddress.IPv4Network]]:
    """Return the networks that a host sends to each of its peers, from its configuration."""
    found = {}
    for section in sections(of, fleet)[1:]:
        fields = dict(line.split(" = ") for line in section[2:])
        networks = fields["AllowedIPs"].split(", ")
        found[section[1].removeprefix("# ")] = [ipaddress.IPv4Network(each) for each in networks]
    return found


def next_hop(
    of: Member, goal: Member, all_routes: dict[str, dict[str, list[ipaddress.IPv4Network]]]
) -> str:
    """Return the peer with the longest route to an address, as the kernel does."""
    fitting = [
        (network.prefixlen, peer)
        for peer, networks in all_routes[of.name].items()
        for network in networks
        if goal.address in network
    ]
    return max(fitting)[1]


@hypothesis_settings(max_examples=40, deadline=None, database=None)
@given(
    hubs=st.sets(st.sampled_from("abcdef"), max_size=3),
    hidden=st.sets(st.sampled_from("abcdefg"), max_size=4),
    size=st.integers(2, 7),
)
def test_every_host_reaches_every_other_over_hosts_that_pass_on(
    hubs: set[str], hidden: set[str], size: int
) -> None:
    names = "abcdefg"[:size]
    hidden = {name for name in hidden if name not in hubs}
    if not hubs & set(names):
        hidden = set(sorted(hidden)[:1])  # two hidden ones need a hub, which is checked elsewhere
    fleet = members(
        **{
            name: {"wireguard_hub": name in hubs}
            | ({"wireguard_endpoint": "none"} if name in hidden else {})
            for name in names
        }
    )
    all_routes = {name: routes(fleet[name], fleet) for name in names}
    for name, peers in all_routes.items():
        for peer in peers:
            assert name in all_routes[peer], "a peer that does not know us drops what we send"
            assert fleet[peer].endpoint or fleet[name].endpoint, "nobody could begin"
    for start in names:
        for goal in set(names) - {start}:
            place, hops = start, 0
            while place != goal:
                assert place == start or fleet[place].is_hub, "passed on by no hub"
                place = next_hop(fleet[place], fleet[goal], all_routes)
                hops += 1
                assert hops <= 3
