"""Our own membership record, signed again when it is old or has changed."""

import logging
import time
from collections.abc import Sequence

from worker import settings
from worker.swarm.identity import Identity
from worker.swarm.log_throttle import RecentEvents
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Member

log = logging.getLogger(__name__)


class OwnRecord:
    """Signs our record; `environments` and `families` are those of our mix."""

    def __init__(
        self,
        identity: Identity,
        swarm: settings.Swarm,
        lifetime_seconds: float,
        environments: Sequence[str],
        families: frozenset[bytes],
    ) -> None:
        self.environments = tuple(environments)
        self._identity = identity
        self._families = families
        self._lifetime_seconds = max(1, round(lifetime_seconds))
        self._fresh_seconds = max(1, int(swarm.announce_every_seconds / 4))
        self._newest: Member | None = None
        # Our clock when it was signed; `issued` is ahead of it after several changes in a second.
        self._signed_at = 0
        # Only a duplicate has our key, so other peers can't flood our log here.
        self._logged = RecentEvents()

    def make(
        self,
        addresses: Sequence[str],
        round: int,
    ) -> Member:
        """Return a record with these addresses and our newest round, recent enough to be sent."""
        now, last = int(time.time()), self._newest
        shown = tuple(addresses[: messages.MAX_ADDRESSES])
        is_current = last is not None and (last.addresses, last.round) == (shown, round)
        # abs(): the clock may have been set back.
        if last is not None and is_current and abs(now - self._signed_at) < self._fresh_seconds:
            return last
        issued = max(now, last.issued + 1) if last else now
        self._signed_at = now
        self._newest = messages.seal_member(
            self._identity,
            addresses,
            round,
            issued,
            now + self._lifetime_seconds,
            self.environments,
            self._families,
        )
        return self._newest

    def find_duplicate(self, member: Member) -> str | None:
        """Return an error if `member`, with our identity, is another node; None: it is ours."""
        if self._newest is None or member.issued <= self._newest.issued + 1:
            return None
        places = ",".join(member.addresses)
        error = f"identity {member.peer_id} is also used at {places}; stop one of the two nodes"
        if not self._logged.has(places):
            log.warning("%s", error)
        return error
