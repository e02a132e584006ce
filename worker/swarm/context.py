"""The state of a node in the swarm, which discovery, transport and exchange share."""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from worker import settings
from worker.multiaddr import RELAYED
from worker.runtime.state_dir import StateDir
from worker.swarm import identity
from worker.swarm.discovery import peer_cache
from worker.swarm.discovery.peer_cache import Cache
from worker.swarm.discovery.peer_table import MAX_PEERS_CACHED, Peers
from worker.swarm.log_throttle import LogThrottle
from worker.swarm.own_record import OwnRecord
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Member
from worker.swarm.status import Reach
from worker.swarm.transport.streams import Stream

log = logging.getLogger(__name__)


class SwarmContext:
    """One node's state. Only changed in the network's event loop; other threads may read it.

    `is_member` False (a bootnode, an auditor): other nodes do not draw this node as a peer.
    `bootnodes`: full addresses. `foreign_bootnodes`: peer ids of bootnodes that speak another
    protocol. `traffic`: counts of bytes. `refused`: counts of requests of others that we refused,
    by reason. `wake`: set to look for peers now. `link_up`: set while the daemon runs. `port`: our
    port in this or the last run; 0: none yet.
    """

    def __init__(
        self,
        swarm: settings.Swarm,
        identity_file: Path,
        cache_dir: Path,
        is_member: bool = True,
        environments: Sequence[str] = (),
        families: frozenset[bytes] = frozenset(),
    ) -> None:
        """Raise IdentityError if the identity is missing: it is never created here."""
        self.swarm = swarm
        self.identity_file = identity_file
        self.identity = identity.load(identity_file)
        self.is_member = is_member
        self.peers = Peers(self.identity.peer_id, swarm, environments, families)
        self.own_record = OwnRecord(
            self.identity, swarm, self.peers.lifetime_seconds, environments, families
        )
        self.rng = random.Random()
        self.throttle = LogThrottle()
        self.traffic: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.addresses: tuple[str, ...] = ()
        self.newest_round = -1
        self.last_error: str | None = None
        self.num_restarts = 0
        self.link_up = asyncio.Event()
        self.wake = asyncio.Event()
        self.cache_file = StateDir(cache_dir).peers
        self.cache = peer_cache.load(self.cache_file)
        self.port = swarm.port or self.cache.port
        self.bootnodes = list(swarm.bootnodes)
        self.foreign_bootnodes: set[str] = set()
        self._last_contact: float | None = None  # when a member last contacted us (monotonic)
        self._silent_since: float | None = None  # end of the last round in which none did so

    @property
    def is_up(self) -> bool:
        return self.link_up.is_set()

    @property
    def has_contact(self) -> bool | None:
        """Return whether a member contacted us within a record's lifetime.

        A contact before the last round without any contact does not count. None: there has been
        neither a contact nor such a round yet.
        """
        if self._last_contact is None:
            return None if self._silent_since is None else False
        if self._last_contact < time.monotonic() - self.peers.lifetime_seconds:
            return False
        return self._silent_since is None or self._last_contact > self._silent_since

    @property
    def reach(self) -> Reach:
        """Return how others can connect to this node, as far as is known."""
        if any(RELAYED in address for address in self.addresses):
            return "relay"
        if self.swarm.reachability == "public" or self.swarm.announce:
            return "direct"
        return "none" if self.swarm.reachability == "private" else "unknown"

    def member(self) -> Member:
        """Return our own record, recent enough to be sent to peers."""
        return self.own_record.make(self.addresses, self.newest_round)

    def hear(self, peer_id: str) -> None:
        """Record that a member contacted us.

        It does not count as a contact if we can't learn from the member, or it does not accept us.
        """
        self.peers.answered(peer_id)
        if self.peers.is_open(peer_id):
            self._last_contact = time.monotonic()

    def fall_silent(self) -> None:
        """Record that no peer answered for a whole round; look for peers more often now."""
        self._silent_since = time.monotonic()
        self.wake.set()

    def learn(self, sealed: bytes, sender: str) -> Member:
        """Store a record that `sender` sent. Raises BadRecord."""
        member = messages.open_member(sealed)
        if member.peer_id == self.identity.peer_id:
            self.last_error = self.own_record.find_duplicate(member) or self.last_error
        elif self.peers.learn(member, from_itself=member.peer_id == sender):
            log.debug("peer found peer=%s through=%s", member.peer_id, sender)
        return member

    async def refuse(
        self,
        peer_id: str,
        stream: Stream,
        reason: str,
        explanation: str,
    ) -> None:
        """Send the reason to the peer, count it, and log it (rate-limited per peer and reason)."""
        self.refused[reason] += 1
        level = logging.DEBUG if self.throttle.has((peer_id, reason)) else logging.WARNING
        log.log(level, "request refused peer=%s reason=%s: %s", peer_id, reason, explanation)
        await stream.refuse(reason, explanation)

    def save_cache(self) -> None:
        """Save the peers heard last; if none was heard yet, keep those of the last run."""
        peers = tuple(self.peers.multiaddrs(MAX_PEERS_CACHED)) or self.cache.peers
        bootnodes = tuple(self.bootnodes) or self.cache.bootnodes
        current = Cache(0 if self.swarm.port else self.port, peers, bootnodes)
        if current == self.cache:
            return
        self.cache = current
        try:
            peer_cache.save(self.cache_file, current)
        except OSError as error:
            log.warning("peer cache not written reason=%s", error)
