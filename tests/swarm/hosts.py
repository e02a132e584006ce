"""Peers on hosts of their own, in network namespaces.

The thread of each peer's network, and so its libp2p daemon, lives in a network namespace that the
test can cut off, put behind a firewall, or move to another island.
"""

import ctypes
import os
import shutil
from pathlib import Path

import pytest
from swarm_lab import Lab

from lab.lab_network import Network as Cables
from worker.swarm.network import Network

_CLONE_NEWNET = 0x40000000


class Hosts(Lab):
    """`hosts` maps a peer's name to the number of its host.

    libp2p takes the addresses for public ones, yet no packet can leave the namespaces: there is no
    route out of them.
    """

    def __init__(self, folder: Path, hosts: dict[str, int], patch: pytest.MonkeyPatch) -> None:
        super().__init__(folder)
        self.host = "0.0.0.0"
        self.cables = cables = Cables(f"hwnet{os.getpid()}", prefix="11.88.0")
        cables.make()
        for number in sorted(set(hosts.values())):
            cables.add_host(number)
        supervise = Network._supervise

        async def supervise_on_host(network: Network) -> None:
            _enter(cables.host(hosts[network.context.identity_file.parent.name]))
            await supervise(network)

        patch.setattr(Network, "_supervise", supervise_on_host)

    def close(self) -> None:
        super().close()
        self.cables.remove()


def why_not() -> str | None:
    """None if there can be such hosts here, else the reason in one line."""
    if os.geteuid() != 0:
        return "hosts for the swarm's peers need root: run as root, or leave these tests out"
    missing = [tool for tool in ("ip", "nft") if shutil.which(tool) is None]
    return (
        f"hosts for the swarm's peers need {', '.join(missing)}: install iproute2 and nftables"
        if missing
        else None
    )


def _enter(namespace: str) -> None:
    """Move this thread, and what it starts from now on, to a network namespace."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"can't enter {namespace}")
