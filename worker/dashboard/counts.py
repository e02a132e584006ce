"""Count rounds and peers from the contract's log.

Anyone may write to that log, at no cost on many chains. So only a limited number is kept: the
newest rounds, and the peers that reported last.
"""

from dataclasses import dataclass, field

from worker.chain.coordinator import Event
from worker.multiaddr import is_recorded_id

MAX_ROUNDS = 500
MAX_PEERS = 10_000
NUM_LAST_REWARDS = 24
"""Number of rewards to keep for each peer."""


@dataclass(slots=True)
class Peer:
    """A peer of the swarm. Rewards are in thousandths; None: unknown.

    `rewards` are those of its last rounds, by round; `total` and `wins` are the contract's own
    sums, which reader.py sets.
    """

    account: str | None = None
    total: int | None = None
    wins: int = 0
    last_vote: int | None = None
    rewards: dict[int, int] = field(default_factory=dict)

    @property
    def last_round(self) -> int | None:
        """The newest round with a reward."""
        return max(self.rewards, default=None)


@dataclass(slots=True)
class Round:
    """A round. `total` is the sum of the rewards of its `num_peers` peers, in thousandths."""

    total: int = 0
    num_peers: int = 0


class Tally:
    """Peers by id and rounds by number.

    `began`: the newest round that began, with its block; None: not in the log. `named`: peers named
    in votes since reader.py last read their wins.
    """

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}
        self.rounds: dict[int, Round] = {}
        self.began: tuple[int, int] | None = None
        self.named: set[str] = set()

    def take(self, event: Event, current_round: int) -> None:
        """Count a log entry; rewards of rounds that are not kept are ignored."""
        said = event.arguments
        if event.name == "RoundAdvanced":
            self.began = said["newRoundNumber"], event.block
            return
        if not is_recorded_id(said["peerId"]):
            return
        peer = self.peer(said["peerId"])
        peer.account = str(said["eoa" if event.name == "PeerRegistered" else "account"])
        if event.name == "PeerRegistered":
            return
        number = said["roundNumber"]
        if event.name == "WinnerSubmitted":
            peer.last_vote = max(number, peer.last_vote or 0)
            if len(self.named) < MAX_PEERS:
                self.named.update(filter(is_recorded_id, said["winners"]))
        elif event.name == "RewardSubmitted" and 0 <= current_round - number < MAX_ROUNDS:
            self._add(peer, number, said["reward"])

    def peer(self, peer_id: str) -> Peer:
        """Return the peer, added if it is new."""
        if peer_id not in self.peers and len(self.peers) >= 2 * MAX_PEERS:
            self._forget_peers()
        return self.peers.setdefault(peer_id, Peer())

    def forget_old(self, current_round: int) -> None:
        """Drop the rounds and peers beyond the limits."""
        self.rounds = {
            number: kept
            for number, kept in self.rounds.items()
            if current_round - number < MAX_ROUNDS
        }
        if len(self.peers) > MAX_PEERS:
            self._forget_peers()

    def _add(
        self,
        peer: Peer,
        number: int,
        reward: int,
    ) -> None:
        round = self.rounds.setdefault(number, Round())
        round.total += reward
        # In a contract with stages, a peer has a reward for each stage.
        round.num_peers += number not in peer.rewards
        peer.rewards[number] = peer.rewards.get(number, 0) + reward
        if len(peer.rewards) > NUM_LAST_REWARDS:
            del peer.rewards[min(peer.rewards)]

    def _forget_peers(self) -> None:
        def heard(peer_id: str) -> int:
            last_round = self.peers[peer_id].last_round
            return -1 if last_round is None else last_round

        kept = sorted(self.peers, key=heard, reverse=True)[:MAX_PEERS]
        self.peers = {peer_id: self.peers[peer_id] for peer_id in kept}
