"""A node's knowledge about its peers: records, when they were heard, how they behaved.

It is in memory only and bounded by MAX_PEERS_KNOWN. Removed first are peers that we don't exchange
groups with, then peers known only by hearsay (from other peers, since a record costs its maker
nothing), then peers that contacted us; in each kind those that were silent longest. New peers are
still discovered, because places are reserved for them here and in each draw.
"""

import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from cachetools import FIFOCache

from worker import settings
from worker.swarm.log_throttle import LogThrottle
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Member

log = logging.getLogger(__name__)

MAX_PEERS_KNOWN = 512
HEARSAY_PLACES = 64
"""Number of peers known only by hearsay to keep, however many contacted us."""
HEARSAY_SHARE = 0.25
"""Probability that a peer known only by hearsay is drawn while there are others."""
MAX_PEERS_CACHED = 64
ENOUGH_MET = 8
FEW_GREETINGS = 2
CLOCK_TOLERANCE_SECONDS = 600
"""Limit on how far a peer's clock may be off before its record counts as expired."""
FIRST_QUARANTINE_SECONDS = 60.0
LONGEST_QUARANTINE_SECONDS = 6 * 3600.0
GOOD_PER_STRIKE = 5
"""Valid answers that cancel an invalid one: a peer that lies every other time is detected."""
LEAST_PREFERENCE = 0.1
"""Minimum of each of the three weights (at most 1), so that every peer is drawn sometimes."""
LEARNING_RATE = 0.3
"""Weight of a peer's newest answer in the running mean of its usefulness."""
PLANTED_FACTOR = 0.25
"""Factor of a peer's weight in the draw, for each step in which its text was planted."""
LEAST_TRUST = 0.01
TRUST_DOUBLES_SECONDS = 1800.0
"""Time in which the weight of a peer that no longer sends planted text doubles."""


@dataclass
class _Peer:
    """The state of one peer; times are monotonic seconds.

    `newest`: issue time of the newest record; after a peer sets its clock back, `member` has an
    older one. `seen`: when a newer record last arrived, from any peer. `met`: when the peer itself
    last contacted us. `failures`: consecutive failures to reach it or get an answer. `was_logged`:
    whether it was logged that its versions differ. `closed`: when it last refused to exchange
    groups with us. `useful`: running mean of the share of its groups that had a signal; 1 until it
    was asked.
    """

    member: Member
    newest: int
    seen: float
    met: float | None = None
    failures: int = 0
    was_logged: bool = False
    closed: float | None = None
    useful: float = 1.0


@dataclass
class _Conduct:
    """How a peer behaved.

    `num_good`: valid answers since the last strike was added or removed. `until`: end of the
    quarantine.
    """

    strikes: int = 0
    num_good: int = 0
    until: float = 0.0


@dataclass(frozen=True, slots=True)
class _Trust:
    """A factor of a peer's weight in the draw, from LEAST_TRUST to 1: its value at `since`."""

    factor: float
    since: float

    def at(self, now: float) -> float:
        return min(1.0, self.factor * math.exp2((now - self.since) / TRUST_DOUBLES_SECONDS))


class Peers:
    """The peers that one node knows. Only used in the event loop; `clock` is monotonic seconds."""

    def __init__(
        self,
        me: str,
        swarm: settings.Swarm,
        environments: Collection[str] = (),
        families: frozenset[bytes] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with no peers.

        `environments`: names and versions of our environments; empty for a bootnode, which learns
        from no peer. `families`: hashes of our task families, as in a record.
        """
        self.lifetime_seconds = 3 * swarm.announce_every_seconds
        self._me = me
        self._swarm = swarm
        self._environments = {e.partition(" ")[0]: e for e in environments}
        self._families = families
        self._clock = clock
        self._peers: dict[str, _Peer] = {}
        self._conduct: FIFOCache[str, _Conduct] = FIFOCache(MAX_PEERS_KNOWN)
        # Of peers that sent planted text; kept longer than their records.
        self._trust: FIFOCache[str, _Trust] = FIFOCache(MAX_PEERS_KNOWN)
        # Peers that speak another version -> that version, and when it was heard.
        self._versions: FIFOCache[str, tuple[int, float]] = FIFOCache(MAX_PEERS_KNOWN)
        self._versions_lock = threading.Lock()  # another thread reads them for the status
        self._throttle = LogThrottle()
        self._registered: frozenset[str] | None = None if not swarm.only_registered else frozenset()

    def __len__(self) -> int:
        return len(self._live())

    def learn(
        self,
        member: Member,
        *,
        from_itself: bool,
    ) -> bool:
        """Store a record. Return whether the peer is new here.

        A record that the peer itself sent is always stored, whatever its clock says now or said
        before. A record from another peer must not be expired, and must be newer than every record
        of the peer that we have seen.
        """
        now = self._clock()
        if member.peer_id == self._me:
            return False
        if not from_itself and member.expires + CLOCK_TOLERANCE_SECONDS < time.time():
            return False
        peer = self._peers.get(member.peer_id)
        is_new = peer is None or now - peer.seen > self.lifetime_seconds
        if peer is None:
            peer = self._peers[member.peer_id] = _Peer(member, member.issued, now)
        elif from_itself or member.issued > peer.newest:
            peer.member, peer.newest, peer.seen = member, max(peer.newest, member.issued), now
        if from_itself:
            peer.met, peer.failures = now, 0
        self._make_room()
        self._tell(peer)
        return is_new

    def answered(self, peer_id: str) -> None:
        """Record that the peer contacted us, or answered."""
        if peer := self._peers.get(peer_id):
            peer.met, peer.seen, peer.failures = self._clock(), self._clock(), 0

    def failed(self, peer_id: str) -> None:
        """Record that the peer could not be reached, or did not answer."""
        if peer := self._peers.get(peer_id):
            peer.failures += 1

    def known(self) -> list[str]:
        """Return the live peers; may be called from another thread."""
        return self._live()

    def num_failures(self, peer_id: str) -> int:
        """Return the number of consecutive failures to reach the peer or get an answer."""
        peer = self._peers.get(peer_id)
        return peer.failures if peer else 0

    def knows(self, peer_id: str) -> bool:
        return peer_id in self._peers

    def addresses(self, peer_id: str) -> tuple[str, ...]:
        peer = self._peers.get(peer_id)
        return peer.member.addresses if peer else ()

    def record(self, peer_id: str) -> bytes | None:
        """Return the peer's record as it was signed; None if it is unknown."""
        peer = self._peers.get(peer_id)
        return peer.member.sealed if peer else None

    def is_understood(self, peer_id: str) -> bool:
        """Return whether the peer shares an environment with us, in the same version.

        Without one, none of its tasks can be checked.
        """
        peer, ours = self._peers.get(peer_id), self._environments.values()
        return peer is None or not ours or not set(ours).isdisjoint(peer.member.environments)

    def is_allowed(self, peer_id: str) -> bool:
        """Return whether the settings permit an exchange of groups with the peer."""
        only = self._swarm.only_peers
        return (not only or peer_id in only) and (
            self._registered is None or peer_id in self._registered
        )

    @property
    def whom_allowed(self) -> str:
        """Return the explanation that is sent to peers that the settings exclude."""
        if self._swarm.only_registered:
            return (
                "this node exchanges groups only with peers that were registered on the chain when"
                " its round began"
            )
        return "this node exchanges groups only with the peers in its settings"

    def is_source(self, peer_id: str) -> bool:
        """Return whether we could learn from the peer."""
        return self.is_understood(peer_id) and self.is_allowed(peer_id)

    def is_open(self, peer_id: str) -> bool:
        """Return whether we could learn from the peer and it accepts us.

        It counts as accepting us unless it has refused within a record's lifetime.
        """
        peer, since = self._peers.get(peer_id), self._clock() - self.lifetime_seconds
        is_closed = peer is not None and peer.closed is not None and peer.closed >= since
        return self.is_source(peer_id) and not is_closed

    def close(self, peer_id: str) -> None:
        """Record that the peer refuses to exchange groups with us."""
        if peer := self._peers.get(peer_id):
            peer.closed = self._clock()

    def open(self, peer_id: str) -> None:
        """Record that the peer exchanges groups with us."""
        if peer := self._peers.get(peer_id):
            peer.closed = None

    def allow_registered(self, peer_ids: Collection[str]) -> None:
        """Set the peers that are registered on the chain, for `only_registered`."""
        if self._swarm.only_registered:
            self._registered = frozenset(peer_ids)

    def speaks(self, peer_id: str, version: int) -> None:
        """Record, and log once a peer, that the peer speaks another version of the exchange."""
        if peer_id not in self._versions and self._throttle.may():
            log.warning(
                "peer speaks another version of the exchange peer=%s theirs=%d ours=%d:"
                " upgrade the older of the two",
                peer_id,
                version,
                messages.VERSION,
            )
        with self._versions_lock:
            self._versions[peer_id] = version, self._clock()

    def other_versions(self) -> dict[str, int]:
        """Return the number of live peers by other version, such as "exchange 2".

        These are versions of our environments and of the exchange that are not ours.
        """
        since = self._clock() - self.lifetime_seconds
        named = Counter[str]()
        for peer_id in self._live():
            if (peer := self._peers.get(peer_id)) is not None:
                named.update(self._differing(peer))
        with self._versions_lock:
            versions = list(self._versions.values())
        named.update(f"exchange {version}" for version, when in versions if when >= since)
        return dict(named)

    def draw(
        self,
        rng: random.Random,
        exclude: Collection[str],
    ) -> str | None:
        """Draw a random peer by weight; None if no peer is left.

        It is a peer that we can learn from and that is not in quarantine, sometimes one known only
        by hearsay. A peer that failed recently or refuses us is drawn only if there is no other.
        """
        now = self._clock()
        free = [
            p
            for p in self._live()
            if p not in exclude and self.is_source(p) and not self._is_quarantined(p, now)
        ]
        sound = [p for p in free if not self._peers[p].failures and self.is_open(p)] or free
        if not sound:
            return None
        weights = {p: self._weigh(p, now) for p in sound}
        told = [p for p in sound if not self._is_met(p, now)]
        if 0 < len(told) < len(sound):
            all_told = sum(weights[p] for p in told)
            all_met = sum(weights.values()) - all_told
            factor = HEARSAY_SHARE / (1 - HEARSAY_SHARE) * all_met / all_told
            weights.update((p, weights[p] * factor) for p in told)
        return rng.choices(sound, list(weights.values()))[0]

    def rate(self, peer_id: str, share: float) -> None:
        """Record the share (0 to 1) of the peer's groups that we could learn from."""
        if peer := self._peers.get(peer_id):
            peer.useful += LEARNING_RATE * (share - peer.useful)

    def distrust(self, peer_id: str) -> None:
        """Record that the peer sent planted text; it is drawn much less until it has stopped."""
        now = self._clock()
        factor = max(LEAST_TRUST, PLANTED_FACTOR * self._trust_of(peer_id, now))
        self._trust.pop(peer_id, None)  # the latest is forgotten last
        self._trust[peer_id] = _Trust(factor, now)

    def to_greet(
        self,
        rng: random.Random,
        count: int,
    ) -> list[str]:
        """Return at most `count` peers to greet.

        These are peers that were silent for half a record's lifetime or did not answer last time,
        and peers known only by hearsay. Either kind may take at least half of the places; peers
        that failed most often come last. If enough peers contacted us recently, only a few are
        greeted, because a greeting brings up to 10 KB of records.
        """
        now = self._clock()
        stale = now - self.lifetime_seconds / 2
        if sum(self._is_met(p, now) for p in self._peers) >= ENOUGH_MET:
            count = min(count, FEW_GREETINGS)
        known, told = list[str](), list[str]()
        for peer_id in self._live():
            peer = self._peers[peer_id]
            if peer.met is None:
                told.append(peer_id)
            elif peer.met < stale or peer.failures:
                known.append(peer_id)
        for kind in (known, told):
            rng.shuffle(kind)
            kind.sort(key=lambda p: self._peers[p].failures)
        not_told = max(count - count // 2, count - len(told))
        num_known = min(len(known), not_told)
        return known[:num_known] + told[: count - num_known]

    def sample(
        self,
        rng: random.Random,
        count: int,
        exclude: str,
    ) -> list[bytes]:
        """Return records to relay: those of peers that contacted us within a record's lifetime.

        Otherwise records of dead peers would circulate.
        """
        now = self._clock()
        met = [p for p in self._live() if p != exclude and self._is_met(p, now)]
        return [self._peers[p].member.sealed for p in rng.sample(met, min(count, len(met)))]

    def strike(self, peer_id: str) -> float:
        """Record that the peer sent invalid data; return the seconds of quarantine, 0: none.

        The quarantine begins with the second strike and grows with each further one.
        """
        conduct = self._conduct.setdefault(peer_id, _Conduct())
        conduct.strikes, conduct.num_good = conduct.strikes + 1, 0
        if conduct.strikes < 2:
            return 0.0
        seconds = min(
            FIRST_QUARANTINE_SECONDS * 2.0 ** min(conduct.strikes - 2, 30),
            LONGEST_QUARANTINE_SECONDS,
        )
        conduct.until = self._clock() + seconds
        return seconds

    def absolve(self, peer_id: str) -> None:
        """Record an answer with only valid groups; GOOD_PER_STRIKE such answers cancel a strike."""
        conduct = self._conduct.get(peer_id)
        if conduct is None:
            return
        conduct.num_good += 1
        if conduct.num_good == GOOD_PER_STRIKE:
            conduct.strikes, conduct.num_good = conduct.strikes - 1, 0
        if not conduct.strikes:
            del self._conduct[peer_id]

    def quarantined(self) -> tuple[str, ...]:
        """Return the peers in quarantine, for readers in other threads."""
        now = self._clock()
        return tuple(sorted(p for p, conduct in [*self._conduct.items()] if now < conduct.until))

    def is_quarantined(self, peer_id: str) -> bool:
        return self._is_quarantined(peer_id, self._clock())

    def multiaddrs(self, count: int) -> list[str]:
        """Return full addresses (with /p2p/) of the peers heard last, for the cache."""
        met = [(peer.met, peer.member) for peer in self._peers.values() if peer.met is not None]
        met.sort(key=lambda pair: -pair[0])
        found = []
        for _, member in met[:count]:
            found += [f"{address}/p2p/{member.peer_id}" for address in member.addresses[:2]]
        return found

    def _live(self) -> list[str]:
        since = self._clock() - self.lifetime_seconds
        # A copy: other threads look at the number of peers.
        return [peer_id for peer_id, peer in list(self._peers.items()) if peer.seen >= since]

    def _weigh(self, peer_id: str, now: float) -> float:
        """Return the draw's weight of a peer.

        It is the product of three preferences from LEAST_PREFERENCE to 1, each raised to the power
        in its setting, and of the trust in the peer's text.
        """
        peer = self._peers[peer_id]
        shared = (
            len(self._families & peer.member.families) / len(self._families)
            if self._families
            else 1.0
        )
        fresh = 1 - (now - peer.seen) / self.lifetime_seconds
        powers = self._swarm.draw_families, self._swarm.draw_fresh, self._swarm.draw_useful
        weight = self._trust_of(peer_id, now)
        for preference, power in zip((shared, fresh, peer.useful), powers, strict=True):
            weight *= max(LEAST_PREFERENCE, preference) ** power
        return weight

    def _trust_of(self, peer_id: str, now: float) -> float:
        trust = self._trust.get(peer_id)
        return 1.0 if trust is None else trust.at(now)

    def _differing(self, peer: _Peer) -> list[str]:
        differing = []
        for theirs in peer.member.environments:
            name, _, _ = theirs.partition(" ")
            if self._environments.get(name, theirs) != theirs:
                differing.append(theirs)
        return differing

    def _tell(self, peer: _Peer) -> None:
        """Log a peer's other versions once, and again if it had our versions in the meantime."""
        differing = self._differing(peer)
        if not differing:
            peer.was_logged = False
        elif not peer.was_logged and self._throttle.may():
            peer.was_logged = True
            log.warning(
                "peer runs another version, so its tasks can't be verified here peer=%s theirs=%s"
                " ours=%s: upgrade the older of the two",
                peer.member.peer_id,
                ", ".join(differing),
                ", ".join(self._environments.values()),
            )

    def _is_quarantined(self, peer_id: str, now: float) -> bool:
        conduct = self._conduct.get(peer_id)
        return conduct is not None and now < conduct.until

    def _is_met(self, peer_id: str, now: float) -> bool:
        """Return whether the peer itself contacted us within a record's lifetime."""
        met = self._peers[peer_id].met
        return met is not None and met >= now - self.lifetime_seconds

    def _make_room(self) -> None:
        now = self._clock()
        while len(self._peers) > MAX_PEERS_KNOWN:
            told = [p for p in self._peers if not self._is_met(p, now)]
            met = [p for p in self._peers if self._is_met(p, now)]
            of_no_use = [p for p in self._peers if not self.is_allowed(p)]
            candidates = of_no_use or (told if len(told) > HEARSAY_PLACES else met)
            del self._peers[min(candidates, key=lambda p: self._peers[p].seen)]
