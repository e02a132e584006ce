"""Read what the dashboard shows: one thread polls the chain, independent of requests.

The log is read once, from where the last poll ended; sums over all time (total rewards, wins) come
from the contract's state, which outlives the log (docs/decisions/0020). What can't be read stays as
it was, with the error next to it.
"""

import logging
import time
from typing import Any

from worker.chain.coordinator import Coordinator
from worker.dashboard.counts import MAX_PEERS, MAX_ROUNDS, Peer, Round, Tally
from worker.dashboard.verdicts import Verdicts
from worker.errors import ChainError, WorkerError
from worker.log import discreet, printable
from worker.multiaddr import is_recorded_id
from worker.runtime.outage import Outage
from worker.settings import Settings
from worker.swarm.identity import animal_name

log = logging.getLogger(__name__)

MAX_PEERS_SHOWN = 1000
_EVENTS = ("PeerRegistered", "RewardSubmitted", "WinnerSubmitted", "RoundAdvanced")
_PIECE_BLOCKS = 2000
"""Blocks of the log per request; an error in between repeats that many."""
_PAGE_PEERS = 500
"""Peers per query of the contract."""
_MAX_BOOTNODES, _MAX_TEXT = 32, 256
_MAX_ROUND = 2**52
"""Larger numbers are not exact in a browser."""


class Reader:
    """State of the swarm in these settings: `look` updates it, `content` returns it."""

    def __init__(self, settings: Settings) -> None:
        self._org_id = settings.chain.operator_org_id
        self._accounts_url = settings.dashboard.accounts_url
        self._chain = settings.chain
        self._coordinator = Coordinator(settings.chain)
        self._counts_unaudited = settings.dashboard.count_unaudited
        audit_file = settings.dashboard.audit_file
        self._verdicts = None if audit_file is None else Verdicts(audit_file)
        self._outage = Outage(log)
        self._error: str | None = None
        self._error_since: float | None = None
        self._updated_at: float | None = None
        self._restart()

    def look(self) -> bool:
        """Read what is new; without a valid answer, keep the old state and return False."""
        try:
            self._read()
        except WorkerError as error:
            said = _short(discreet(str(error)))
            if self._error is None:
                self._error_since = time.time()
            self._outage.begin("chain can't be read error=%s", said)
            self._error = said
            # It may come back at another place, so locate it again.
            self._coordinator = Coordinator(self._chain)
        else:
            self._outage.end("chain answers again")
            self._error = self._error_since = None
            self._updated_at = time.time()
        if self._verdicts is not None and self._contract is not None:
            self._verdicts.look(self._contract)
        return self._error is None

    def coordinator(self) -> Coordinator:
        """Return the client that was read last."""
        return self._coordinator

    def content(self) -> dict[str, Any]:
        """Return the answer of /api/swarm, described in docs/operations/host-a-swarm.md."""
        peers = self._tally.peers
        ranked = sorted(peers, key=lambda peer_id: (-(self._counted(peer_id) or 0), peer_id))
        return {
            "updated_at": self._updated_at,
            "error": self._error,
            "error_since": self._error_since,
            "org_id": _short(self._org_id),
            "accounts_url": self._accounts_url,
            "chain_id": self._chain_id,
            "contract": self._contract,
            "round": self._round,
            "stage": self._stage,
            "round_since": self._round_since,
            "bootnodes": [_short(address) for address in self._bootnodes[:_MAX_BOOTNODES]],
            "rounds": [_round_entry(*each) for each in sorted(self._tally.rounds.items())],
            "num_peers": len(peers),
            "ranked_by": "total_reward" if self._counts_unaudited else "audited_reward",
            "peers": [self._told(peer_id, peers[peer_id]) for peer_id in ranked[:MAX_PEERS_SHOWN]],
            "audit": None if self._verdicts is None else self._verdicts.told(),
        }

    def _counted(self, peer_id: str) -> int | None:
        """Return the reward that the peer is ranked by, in thousandths; None if it is not known."""
        if self._counts_unaudited:
            return self._tally.peers[peer_id].total
        return self._audited_reward(peer_id)

    def _audited_reward(self, peer_id: str) -> int | None:
        return None if self._verdicts is None else self._verdicts.audited_reward(peer_id)

    def _told(
        self,
        peer_id: str,
        peer: Peer,
    ) -> dict[str, Any]:
        return {
            "peer_id": _short(peer_id),
            "name": animal_name(peer_id),
            "account": peer.account,
            "total_reward": peer.total,
            "audited_reward": self._audited_reward(peer_id),
            "wins": peer.wins,
            "last_round": peer.last_round,
            "last_vote": peer.last_vote,
            "rewards": sorted(peer.rewards.items()),
            "audit": None if self._verdicts is None else self._verdicts.of(peer_id),
        }

    # ---- the chain

    def _restart(self) -> None:
        self._tally = Tally()
        self._contract: str | None = None
        self._chain_id: int | None = None
        self._round: int | None = None
        self._stage: int | None = None
        self._round_since: float | None = None
        self._bootnodes: list[str] = []
        self._newest: tuple[int, str | None] | None = None
        """The last block of the log that was read, with its hash."""
        self._next: dict[str, int] | None = None
        """The next block to read, for each kind of event."""
        self._is_behind = True
        """True if blocks came since the contract's state was read."""

    def _read(self) -> None:
        chain = self._coordinator
        chain.ensure_checked()
        newest = chain.block_number()
        if self._newest is not None and self._is_another_chain(*self._newest, newest):
            log.warning("the chain was reset or reorganised: reading it again from the beginning")
            self._restart()
        self._contract, self._chain_id = chain.deployment.contract, chain.deployment.chain_id
        if self._newest is None or self._newest[0] != newest:
            self._newest = newest, chain.block_hash(newest)
            self._is_behind = True
        if self._is_behind:
            round = chain.current_round()
            if round > _MAX_ROUND:
                raise ChainError(
                    f"{self._contract}: is in round {round}, which no swarm reaches; check"
                    " chain.contract"
                )
            self._read_log(newest, round)
            self._read_sums()
            self._stage, self._bootnodes = chain.current_stage(), chain.bootnodes()
            began = self._tally.began
            self._round_since = None  # the log may not have the round's beginning any more
            if began is not None and began[0] == round:
                self._round_since = chain.block_time(began[1])
            self._round = round
            self._is_behind = False

    def _is_another_chain(
        self,
        block: int,
        its_hash: str | None,
        newest: int,
    ) -> bool:
        """Return whether the last block read is gone.

        A killed chain may lose its last seconds, and others reorganise.
        """
        chain = self._coordinator
        return (
            chain.deployment.contract != self._contract
            or newest < block
            or chain.block_hash(block) != its_hash
        )

    def _read_log(self, newest: int, round: int) -> None:
        if self._next is None:
            self._next = dict.fromkeys(_EVENTS, self._first_block(round))
        for name in _EVENTS:
            for first in range(self._next[name], newest + 1, _PIECE_BLOCKS):
                last = min(first + _PIECE_BLOCKS - 1, newest)
                for event in list(self._coordinator.events(name, from_block=first, to_block=last)):
                    self._tally.take(event, round)
                self._next[name] = last + 1
        self._tally.forget_old(round)

    def _first_block(self, round: int) -> int:
        """Return the first block of the log of the rounds that are kept."""
        first_round = round - MAX_ROUNDS + 1
        if first_round <= 0:
            return self._coordinator.first_block()
        began = self._coordinator.events(
            "RoundAdvanced", {"newRoundNumber": first_round}, newest_first=True
        )
        event = next(began, None)
        return self._coordinator.first_block() if event is None else event.block

    def _read_sums(self) -> None:
        """Read the contract's sums, which outlive its log: wins and total rewards."""
        chain, tally = self._coordinator, self._tally
        if chain.abilities.has_leaderboards:
            self._read_leaderboard()
        else:
            # Only votes change wins: ask for the peers named in votes since the last poll.
            named = [peer_id for peer_id in sorted(tally.named) if peer_id in tally.peers]
            for start in range(0, len(named), _PAGE_PEERS):
                page = named[start : start + _PAGE_PEERS]
                for peer_id, wins in zip(page, chain.wins_of(page), strict=True):
                    tally.peers[peer_id].wins = wins
            tally.named.clear()
        known = list(tally.peers)
        for start in range(0, len(known), _PAGE_PEERS):
            page = known[start : start + _PAGE_PEERS]
            for peer_id, total in zip(page, chain.total_rewards(page), strict=False):
                tally.peers[peer_id].total = total

    def _read_leaderboard(self) -> None:
        chain, tally = self._coordinator, self._tally
        for start in range(0, MAX_PEERS, _PAGE_PEERS):
            leaders = chain.winner_leaderboard(start, start + _PAGE_PEERS)
            new = [peer_id for peer_id, _ in leaders if peer_id not in tally.peers]
            unknown = list(filter(is_recorded_id, new))
            for peer_id, owner in zip(unknown, chain.owners_of(unknown), strict=True):
                # A vote may name any text; peers are those that are registered.
                if owner is not None:
                    tally.peer(peer_id).account = owner
            for peer_id, wins in leaders:
                if peer_id in tally.peers:
                    tally.peers[peer_id].wins = wins
            if len(leaders) < _PAGE_PEERS:
                break


def _round_entry(
    number: int,
    round: Round,
) -> dict[str, Any]:
    mean_reward = round.total / round.num_peers
    return {"round": number, "mean_reward": mean_reward, "num_peers": round.num_peers}


def _short(text: str) -> str:
    """Return untrusted text for display: one line, without control characters, truncated."""
    shown = printable(text[:_MAX_TEXT])
    if max(len(text), len(shown)) <= _MAX_TEXT:
        return shown
    return shown[:_MAX_TEXT] + "…"
