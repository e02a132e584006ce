"""The address that a node tells to others, by the name of a network interface."""

import pytest

from worker import node, resources
from worker.errors import SettingsError
from worker.settings import Swarm, from_flat


def test_address_of_an_interface_is_announced_with_the_port() -> None:
    assert resources.interface_address("lo") == "127.0.0.1"
    settings = Swarm(announce_interface="lo", port=38000, announce=("/dns/gpu-1/tcp/1",))
    assert node._announced(settings).announce == ("/dns/gpu-1/tcp/1", "/ip4/127.0.0.1/tcp/38000")


def test_node_without_the_interface_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert resources.interface_address("nothing0") is None
    settings = Swarm(announce_interface="nothing0", port=38000)
    assert node._announced(settings) == settings
    assert "no address to announce interface=nothing0" in caplog.text


def test_announced_interface_needs_a_port() -> None:
    with pytest.raises(SettingsError, match="swarm: announce_interface is set and port is 0; expected a port"):
        from_flat({"swarm_announce_interface": "tailscale0"}, "here")
