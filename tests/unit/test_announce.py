"""The address that a node tells to others, by the name of a network interface."""

import os
import subprocess
import sys

import pytest

from worker.errors import SettingsError
from worker.runtime import host
from worker.settings import Swarm, from_flat
from worker.swarm import announce


def test_address_of_an_interface_is_announced_with_the_port() -> None:
    assert host.interface_address("lo") == "127.0.0.1"
    settings = Swarm(announce_interface="lo", port=38000, announce=("/dns/gpu-1/tcp/1",))
    announced = announce.with_interface_address(settings).announce
    assert announced == ("/dns/gpu-1/tcp/1", "/ip4/127.0.0.1/tcp/38000")


def test_node_without_the_interface_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert host.interface_address("nothing0") is None
    settings = Swarm(announce_interface="nothing0", port=38000)
    assert announce.with_interface_address(settings) == settings
    assert "no address to announce interface=nothing0" in caplog.text


def test_announced_interface_needs_a_port() -> None:
    with pytest.raises(
        SettingsError, match="swarm: announce_interface is set and port is 0; expected a port"
    ):
        from_flat({"swarm_announce_interface": "tailscale0"}, "here")


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network of its own")
def test_node_that_listens_to_ipv6_announces_an_ipv6_address() -> None:
    """On an interface that has nothing else."""
    program = (
        "from worker.swarm.announce import with_interface_address as announced;"
        " from worker.settings import Swarm; own = {'announce_interface': 'v6', 'port': 38000};"
        " print(announced(Swarm(host='::', **own)).announce, announced(Swarm(**own)).announce)"
    )
    script = (
        "ip link add v6 type veth peer name v7 && ip link set v6 up && ip -6 address add"
        " 2001:db8::7/64 dev v6 nodad"
        f' && exec {sys.executable} -c "$0"'
    )
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script, program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "('/ip6/2001:db8::7/tcp/38000',) ()", done.stderr
    assert "it has 2001:db8::7, and swarm.host is 0.0.0.0: make that an IPv6 one" in done.stderr
