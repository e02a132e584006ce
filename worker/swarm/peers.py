"""What a node knows about its peers: records, when they were heard, how they behaved. In memory, with a cache on disk.

Bounded: at most MAX_PEERS_KNOWN; whoever was not heard of for the longest time goes first.
"""

import json
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.swarm.wire import Member

log = logging.getLogger(__name__)

MAX_PEERS_KNOWN = 512
MAX_PEERS_CACHED = 64
CLOCK_TOLERANCE_SECONDS = 600
"""How far a peer's clock may be off before its record counts as expired."""
FIRST_QUARANTINE_SECONDS = 60.0
LONGEST_QUARANTINE_SECONDS = 6 * 3600.0


@dataclass
class _Peer:
    member: Member
    seen: float  # when a newer record came, from whomever (monotonic seconds)
    met: float | None = None  # when the peer itself spoke to us
    failures: int = 0  # in a row: not reached, or silent
    told: bool = False  # whether the log has that it runs another version of an environment


@dataclass
class _Conduct:
    strikes: int = 0
    until: float = 0.0  # end of the quarantine


class Peers:
    """The view of one node. Only used in the network's event loop; `clock` is monotonic seconds."""

    def __init__(
        self,
        me: str,
        lifetime_seconds: float,
        environments: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`environments`: what we make tasks with; none of them: a bootnode, which learns from nobody."""
        self._me = me
        self._environments = {e.partition(" ")[0]: e for e in environments}
        self._lifetime = lifetime_seconds
        self._clock = clock
        self._peers: dict[str, _Peer] = {}
        self._conduct: dict[str, _Conduct] = {}

    def __len__(self) -> int:
        return len(self._live())

    def learn(self, member: Member, *, from_itself: bool) -> bool:
        """Take in a record; the newest of a peer counts. True if the peer is new here.

        A record that somebody else hands on must not be expired; a peer that speaks to us itself is there, whatever its
        clock says.
        """
        now = self._clock()
        if member.peer_id == self._me:
            return False
        if not from_itself and member.expires + CLOCK_TOLERANCE_SECONDS < time.time():
            return False
        peer = self._peers.get(member.peer_id)
        is_new = peer is None or now - peer.seen > self._lifetime
        if peer is None:
            peer = self._peers[member.peer_id] = _Peer(member, now)
            self._make_room()
        elif member.issued > peer.member.issued:
            peer.member, peer.seen = member, now
        if from_itself:
            peer.met, peer.seen, peer.failures = now, now, 0
        self._tell(peer)
        return is_new

    def answered(self, peer_id: str) -> None:
        """The peer spoke to us."""
        if peer := self._peers.get(peer_id):
            peer.met, peer.seen, peer.failures = self._clock(), self._clock(), 0

    def failed(self, peer_id: str) -> None:
        """The peer was not reached, or kept silent."""
        if peer := self._peers.get(peer_id):
            peer.failures += 1

    def knows(self, peer_id: str) -> bool:
        return peer_id in self._peers

    def addresses(self, peer_id: str) -> tuple[str, ...]:
        peer = self._peers.get(peer_id)
        return peer.member.addresses if peer else ()

    def is_understood(self, peer_id: str) -> bool:
        """Whether one of the peer's environments is ours, in the same version: else no task of it can be checked."""
        peer, ours = self._peers.get(peer_id), self._environments.values()
        return peer is None or not ours or not set(ours).isdisjoint(peer.member.environments)

    def other_versions(self) -> dict[str, int]:
        """Versions of our environments that are not ours, with the number of live peers that run them."""
        live = (self._peers.get(peer_id) for peer_id in self._live())
        return dict(Counter(theirs for peer in live if peer is not None for theirs in self._differing(peer)))

    def draw(self, rng: random.Random, exclude: Collection[str]) -> str | None:
        """A random peer that we understand and that is not in quarantine; one that failed lately only if there is no
        other. None: nobody left."""
        now = self._clock()
        free = [
            p for p in self._live() if p not in exclude and self.is_understood(p) and not self._is_quarantined(p, now)
        ]
        sound = [p for p in free if not self._peers[p].failures]
        return rng.choice(sound or free) if free else None

    def to_greet(self, rng: random.Random, count: int) -> list[str]:
        """Peers that we know from others only, or that were silent for half a record's life; those that failed last."""
        stale = self._clock() - self._lifetime / 2
        strangers = [p for p in self._live() if (met := self._peers[p].met) is None or met < stale]
        rng.shuffle(strangers)
        return sorted(strangers, key=lambda p: self._peers[p].failures)[:count]

    def sample(self, rng: random.Random, count: int, exclude: str) -> list[bytes]:
        """Records to hand on: of peers that we heard ourselves within a record's life, so that the dead don't go
        round."""
        since = self._clock() - self._lifetime
        met = [p for p in self._live() if p != exclude and (m := self._peers[p].met) is not None and m >= since]
        return [self._peers[p].member.sealed for p in rng.sample(met, min(count, len(met)))]

    def strike(self, peer_id: str) -> float:
        """The peer sent what does not hold. From the second time in a row on it is not asked for a growing time.

        Returns the seconds of quarantine, 0: none yet.
        """
        conduct = self._conduct.setdefault(peer_id, _Conduct())
        conduct.strikes += 1
        if conduct.strikes < 2:
            return 0.0
        seconds = min(FIRST_QUARANTINE_SECONDS * 2.0 ** min(conduct.strikes - 2, 30), LONGEST_QUARANTINE_SECONDS)
        conduct.until = self._clock() + seconds
        while len(self._conduct) > MAX_PEERS_KNOWN:
            del self._conduct[next(iter(self._conduct))]
        return seconds

    def absolve(self, peer_id: str) -> None:
        """The peer sent groups that all hold: one strike less."""
        conduct = self._conduct.get(peer_id)
        if conduct is not None:
            conduct.strikes -= 1
            if conduct.strikes <= 0:
                del self._conduct[peer_id]

    def is_quarantined(self, peer_id: str) -> bool:
        return self._is_quarantined(peer_id, self._clock())

    def multiaddrs(self, count: int) -> list[str]:
        """Full addresses (with /p2p/) of the peers heard last, for the cache."""
        met = sorted((p for p in self._peers.values() if p.met is not None), key=lambda p: -(p.met or 0.0))
        return [f"{a}/p2p/{p.member.peer_id}" for p in met[:count] for a in p.member.addresses[:2]]

    def _live(self) -> list[str]:
        since = self._clock() - self._lifetime
        # A copy: other threads look at the number of peers.
        return [peer_id for peer_id, peer in list(self._peers.items()) if peer.seen >= since]

    def _differing(self, peer: _Peer) -> list[str]:
        named = [(e, self._environments.get(e.partition(" ")[0])) for e in peer.member.environments]
        return [theirs for theirs, ours in named if ours not in (None, theirs)]

    def _tell(self, peer: _Peer) -> None:
        """Say it once for each peer; once more if it had our versions in between."""
        differing = self._differing(peer)
        if differing and not peer.told:
            log.warning(
                "peer runs another version, so its tasks can't be checked here peer=%s theirs=%s ours=%s: "
                "upgrade the older of the two",
                peer.member.peer_id, ", ".join(differing), ", ".join(self._environments.values()),
            )  # fmt: skip
        peer.told = bool(differing)

    def _is_quarantined(self, peer_id: str, now: float) -> bool:
        conduct = self._conduct.get(peer_id)
        return conduct is not None and now < conduct.until

    def _make_room(self) -> None:
        while len(self._peers) > MAX_PEERS_KNOWN:
            del self._peers[min(self._peers, key=lambda p: self._peers[p].seen)]


@dataclass(frozen=True)
class Cache:
    """What survives a restart: our own port, and where peers were. Losing it costs nothing but time."""

    port: int = 0
    multiaddrs: tuple[str, ...] = ()


def load_cache(path: Path) -> Cache:
    """The cache at `path`; empty if there is none or if it is damaged, which is said in the log."""
    try:
        data = json.loads(path.read_text())
        port, multiaddrs = int(data["port"]), tuple(str(a) for a in data["peers"][: 2 * MAX_PEERS_CACHED])
    except FileNotFoundError:
        return Cache()
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("peer cache ignored path=%s reason=%s", path, error)
        return Cache()
    return Cache(port if 0 <= port <= 65535 else 0, multiaddrs)


def save_cache(path: Path, port: int, multiaddrs: Sequence[str]) -> None:
    """Replace the cache, all of it or nothing. Raises OSError."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps({"version": 1, "port": port, "peers": list(multiaddrs)}))
    os.replace(draft, path)
