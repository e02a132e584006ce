"""Counters of the swarm part, and its status for readers. Importing it is cheap."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

MAX_SENDERS_COUNTED = 512
MAX_QUARANTINED = 16
REFUSALS = frozenset(
    {"full", "flood", "not-allowed", "environment", "version", "skipped", "not-ready", "not-held"}
)
"""Reasons with which peers of this version refuse requests.

All other reasons are untrusted text and are counted together.
"""

Reach = Literal["direct", "relay", "none", "unknown"]
"""How others can connect to a node: directly, through a relay, not at all, or unknown yet."""
State = Literal["starting", "connected", "training-alone", "catching-up"]


@dataclass(frozen=True, slots=True)
class SwarmStatus:
    """The state of the swarm part. Numbers are since the start.

    `connected`: groups of peers arrived in the last round, or (before the end of the first round)
    usable peers that accept us contacted us. `catching-up`: such peers contact us, but none of
    their groups arrived in the last round.

    `peers_heard`: those that answered in the last round. `rejected`: dropped groups and messages by
    reason; `rejected_by_peer` the same by sender. `quarantines`: when (Unix time) and why, of the
    MAX_QUARANTINED peers that were quarantined last. `groups_handed_on`: number of other peers'
    groups that we served.
    `newest_group_at`: Unix time at which the newest verified group of a peer arrived; None: none
    yet. `requests_refused`: number of requests that we refused, by reason ("elsewhere": we were
    full and named peers that hold our groups); `refused_by_peers`: number of our requests that
    peers refused, by reason. `versions`: the versions that a peer must share, such as "exchange 4";
    `other_versions`: number of known peers for each other version of one of these.
    `foreign_bootnodes`: peer ids of bootnodes that answer but do not speak hivewright's protocol.
    `quarantined`: peer ids that are not asked for a while because they sent invalid groups.
    `rounds_unanswered`: number of rounds trained alone because the event loop did not answer.
    """

    state: State
    peer_id: str
    peers_known: int = 0
    peers_heard: tuple[str, ...] = ()
    rejected: dict[str, int] = field(default_factory=dict)
    rejected_by_peer: dict[str, int] = field(default_factory=dict)
    quarantines: dict[str, tuple[float, str]] = field(default_factory=dict)
    groups_offered: int = 0
    groups_fetched: int = 0
    groups_verified: int = 0
    groups_handed_on: int = 0
    newest_group_at: float | None = None
    requests_refused: dict[str, int] = field(default_factory=dict)
    refused_by_peers: dict[str, int] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    daemon_restarts: int = 0
    rounds_unanswered: int = 0
    versions: tuple[str, ...] = ()
    other_versions: dict[str, int] = field(default_factory=dict)
    addresses: tuple[str, ...] = ()
    reach: Reach = "unknown"
    foreign_bootnodes: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()
    last_error: str | None = None


@dataclass
class Tally:
    """Counters since the start.

    `groups`: numbers of groups by "offered", "fetched", "verified" and "handed-on".
    `groups_a_peer`: number of groups of the last sender; 0: none yet.
    """

    groups: "Counter[str]" = field(default_factory=Counter)
    rejected: "Counter[str]" = field(default_factory=Counter)
    rejected_by_peer: "Counter[str]" = field(default_factory=Counter)
    quarantines: dict[str, tuple[float, str]] = field(default_factory=dict)
    refused: "Counter[str]" = field(default_factory=Counter)
    newest_group_at: float | None = None
    rounds_unanswered: int = 0
    groups_a_peer: int = 0

    def reject(self, peer_id: str, reason: str) -> None:
        self.rejected[reason] += 1
        if peer_id in self.rejected_by_peer or len(self.rejected_by_peer) < MAX_SENDERS_COUNTED:
            self.rejected_by_peer[peer_id] += 1

    def quarantine(self, peer_id: str, reason: str) -> None:
        """Note the start of a peer's quarantine, and the reason."""
        self.quarantines.pop(peer_id, None)
        self.quarantines[peer_id] = time.time(), reason
        if len(self.quarantines) > MAX_QUARANTINED:
            del self.quarantines[next(iter(self.quarantines))]

    def note_refusal(self, reason: str) -> None:
        """Count that a peer refused a request of ours."""
        self.refused[reason if reason in REFUSALS else "other"] += 1

    @property
    def newest_group_seconds(self) -> int | None:
        """Return the age of the newest valid group of a peer; None: there was none yet."""
        return (
            None
            if self.newest_group_at is None
            else max(0, round(time.time() - self.newest_group_at))
        )

    def take_in(self, num_fetched: int, num_verified: int) -> None:
        self.groups["fetched"] += num_fetched
        self.groups["verified"] += num_verified
        if num_verified:
            self.newest_group_at = time.time()
            self.groups_a_peer = num_fetched
