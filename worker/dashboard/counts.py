"""Rounds and peers, counted from the contract's log as it comes.

Anybody may write into that log, at no cost on many chains. So what is kept is bounded, whoever
writes however much: of rounds the newest, of peers those that reported last.
"""

from dataclasses import dataclass, field

from worker.chain.coordinator import Event
from worker.multiaddr import is_recorded_id

MAX_ROUNDS = 500
MAX_PEERS = 10_000
NUM_LAST_REWARDS = 24
"""Of each peer."""
# Our contract takes 128 bytes as a peer id, read as four characters each if they are no text;
# libp2p's have 46 to 59.


@dataclass(slots=True)
class Peer:
    """Rewards are in thousandths. `rewards`: of its last rounds, by round; `total` and `wins` are
    the contract's own sums, to be set from there. None: not known."""

    account: str | None = None
    total: int | None = None
    wins: int = 0
    last_vote: int | None = None
    rewards: dict[int, int] = field(default_factory=dict)

    @property
    def last_round(self) -> int | None:
        """The newest round that it got a reward for."""
        return max(self.rewards, default=None)


@dataclass(slots=True)
class Round:
    """`total`: of the rewards of its `num_peers`, in thousandths."""

    total: int = 0
    num_peers: int = 0


class Tally:
    """Peers by id and rounds by number. `began`: the newest round that began, with its block; None:
    not in the log.

    `named` are the peers that votes named, until whoever reads their wins takes them out.
    """

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}
        self.rounds: dict[int, Round] = {}
        self.began: tuple[int, int] | None = None
        self.named: set[str] = set()

    def take(self, event: Event, current_round: int) -> None:
        """Count one entry of the log; rewards of rounds that are not kept are left out."""
        said = event.arguments
        if event.name == "RoundAdvanced":
            self.began = said["newRoundNumber"], event.block
            return
        if not is_recorded_id(said["peerId"]):
            return
        peer = self.peer(said["peerId"])
        peer.account = str(said["eoa" if event.name == "PeerRegistered" else "account"])
        if event.name == "WinnerSubmitted":
            peer.last_vote = max(said["roundNumber"], peer.last_vote or 0)
            if len(self.named) < MAX_PEERS:
                self.named.update(filter(is_recorded_id, said["winners"]))
        elif (
            event.name == "RewardSubmitted"
            and 0 <= current_round - said["roundNumber"] < MAX_ROUNDS
        ):
            self._add(peer, said["roundNumber"], said["reward"])

    def peer(self, peer_id: str) -> Peer:
        """The peer, a new one if need be."""
        if peer_id not in self.peers and len(self.peers) >= 2 * MAX_PEERS:
            self._forget_peers()
        return self.peers.setdefault(peer_id, Peer())

    def forget_old(self, current_round: int) -> None:
        """Keep what is to be kept at most."""
        self.rounds = {
            number: kept
            for number, kept in self.rounds.items()
            if current_round - number < MAX_ROUNDS
        }
        if len(self.peers) > MAX_PEERS:
            self._forget_peers()

    def _add(self, peer: Peer, number: int, reward: int) -> None:
        round = self.rounds.setdefault(number, Round())
        round.total += reward
        # Where a round has stages, a peer gets a reward for each.
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
