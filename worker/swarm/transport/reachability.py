"""Check that bootnodes can be reached as libp2p peers with the key that their address names."""

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

from worker import settings
from worker.errors import SwarmError
from worker.multiaddr import split_peer
from worker.runtime.state_dir import StateDir
from worker.swarm import identity
from worker.swarm.transport.daemon import PROTOCOL, Daemon, speaks_otherwise

START_SECONDS = 20.0
DIAL_SECONDS = 10.0


def reach(multiaddrs: Sequence[str]) -> dict[str, str | None]:
    """Dial addresses that end in /p2p/PEER; return the reason of failure for each, None if reached.

    Takes 30 s at most. It uses a temporary identity, so a node that runs here is not disturbed.
    """
    return asyncio.run(_reach(multiaddrs))


async def _reach(multiaddrs: Sequence[str]) -> dict[str, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        key_file = StateDir(Path(folder)).identity
        identity.create(key_file)
        swarm = settings.Swarm(host="127.0.0.1", startup_timeout_seconds=START_SECONDS)
        daemon = await Daemon.start(key_file, swarm, 0)
        try:
            dials = [_dial(daemon, multiaddr) for multiaddr in multiaddrs]
            reasons = await asyncio.gather(*dials)
        finally:
            await daemon.stop()
    return dict(zip(multiaddrs, reasons, strict=True))


async def _dial(daemon: Daemon, multiaddr: str) -> str | None:
    address, peer_id = split_peer(multiaddr)
    if not address:
        return "does not end in /p2p/PEER"
    try:
        await daemon.connect(peer_id, [address], DIAL_SECONDS)
        _, writer = await daemon.open_stream(peer_id, PROTOCOL, DIAL_SECONDS)
        writer.close()
    except SwarmError as error:
        if speaks_otherwise(error):
            return f"answers, but is not hivewright's (no {PROTOCOL})"
        return str(error)
    except TimeoutError:
        return f"no answer within {DIAL_SECONDS:g} s"
    return None
