"""Peers on hosts of their own: each one's libp2p daemon, which is all that touches the network, lives in a network
namespace that the test can cut off, put behind a firewall, or move to another island."""

import os
import shutil
from pathlib import Path

from swarm_lab import Lab

from tests.lab.network import Network
from worker.swarm import daemon

_P2PD = daemon.P2PD  # the real one


class Hosts(Lab):
    """`hosts` maps a peer's name to the number of its host. The addresses are public ones to libp2p, and yet no packet
    can leave the namespaces: there is no route out of them."""

    def __init__(self, folder: Path, hosts: dict[str, int]) -> None:
        super().__init__(folder)
        self.host = "0.0.0.0"
        self.cables = Network(f"hwnet{os.getpid()}", prefix="11.88.0")
        self.cables.make()
        for number in sorted(set(hosts.values())):
            self.cables.add_host(number)
        cases = "".join(f"*/{name}/swarm.pem) host={self.cables.host(number)};;\n" for name, number in hosts.items())
        self.program = folder / "p2pd"
        self.program.write_text(
            f'#!/bin/sh\ncase "$2" in\n{cases}*) echo "no host for $2"; exit 1;;\nesac\n'
            f'exec ip netns exec "$host" {_P2PD} "$@"\n'
        )
        self.program.chmod(0o755)

    def close(self) -> None:
        super().close()
        self.cables.remove()


def why_not() -> str | None:
    """None if there can be such hosts here, else the reason in one line."""
    if os.geteuid() != 0:
        return "hosts for the swarm's peers need root: run as root, or leave these tests out"
    missing = [tool for tool in ("ip", "nft") if shutil.which(tool) is None]
    return f"hosts for the swarm's peers need {', '.join(missing)}: install iproute2 and nftables" if missing else None
