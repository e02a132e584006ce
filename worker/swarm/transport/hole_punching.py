"""Repeat hole punching by reconnecting to peers that are connected through a relay.

libp2p tries to punch a hole only when a connection through a relay is made. It does not try again
when it later learns at which address others see it, which takes four direct connections. Also, a
peer that has reached us through a relay counts as connected, so libp2p does not dial it again even
if it is public. Therefore connections through relays are renewed from time to time, while they are
not in use.
"""

import contextlib
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from worker.errors import SwarmError
from worker.swarm.transport.connections import Connections
from worker.swarm.transport.daemon import Daemon

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 1800.0
"""Some firewalls can't be traversed. A relay ends each connection after this time anyway."""


@dataclass
class _Relayed:
    pause: float
    renew_at: float  # monotonic seconds


class HolePunching:
    """Renewal of relayed connections, during one run of the daemon."""

    def __init__(self, connections: Connections, daemon: Daemon) -> None:
        self._connections = connections
        self._daemon = daemon
        self._relayed: dict[str, _Relayed] = {}

    async def drop_relayed(
        self,
        contacts: Collection[str],
    ) -> list[str]:
        """Drop relayed connections with `contacts` that are due; return the peers to greet again.

        Greeting them makes new connections. Raises SwarmError or TimeoutError if the daemon does
        not answer.
        """
        now, dropped = time.monotonic(), list[str]()
        connections = await self._daemon.connections()
        only_relayed = [
            p for p, is_direct in connections.items() if not is_direct and p in contacts
        ]
        first = now + FIRST_PAUSE_SECONDS
        self._relayed = {
            p: self._relayed.get(p) or _Relayed(FIRST_PAUSE_SECONDS, first) for p in only_relayed
        }
        for peer_id, relayed in self._relayed.items():
            if now < relayed.renew_at or self._connections.is_talking_with(peer_id):
                continue
            relayed.pause = min(2 * relayed.pause, LONGEST_PAUSE_SECONDS)
            relayed.renew_at = now + relayed.pause
            with contextlib.suppress(SwarmError):  # it is gone already
                await self._daemon.disconnect(peer_id)
            dropped.append(peer_id)
            log.debug(
                "relayed connection dropped, to be dialled again peer=%s next_seconds=%.0f",
                peer_id,
                relayed.pause,
            )
        return dropped
