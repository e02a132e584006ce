"""Read the data that the dashboard shows: one thread polls the chain, independent of requests.

Each poll reads the log from the end of the last one; sums over all time (total rewards, wins) come
from the contract's state, which outlives the log (docs/decisions/0020). The newest rounds are kept
in memory, all rounds in the store. After an error the old data stays, with the error next to it.
"""

import json
import logging
import sqlite3
import time
from typing import Any

from worker.chain.coordinator import Coordinator
from worker.dashboard.counts import MAX_PEERS, MAX_ROUNDS, Peer, Round, Tally
from worker.dashboard.store import MAX_ROUNDS as MAX_STORED_ROUNDS
from worker.dashboard.store import Store
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
"""Number of blocks of the log per request; after an error they are read again."""
_PAGE_PEERS = 500
"""Number of peers per query of the contract."""
_MAX_BOOTNODES, _MAX_TEXT = 32, 256
_MAX_TIMES = 20
"""Number of blocks whose times are read in one poll."""
_MAX_ROUND = 2**52
"""Largest integer that is exact in a browser."""


class Reader:
    """State of the swarm in these settings: `look` updates it, `content` returns it."""

    def __init__(self, settings: Settings, store: Store | None = None) -> None:
        """Without a store, the history is kept in memory."""
        self._store = store or Store(None)
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
        self._recall()

    def look(self) -> bool:
        """Read what is new; without a valid answer, keep the old state and return False."""
        try:
            self._store.ensure_whole()
            if self._store.is_new:
                self._restart()
                self._store.is_new = False
            self._read()
        except (WorkerError, sqlite3.Error) as error:
            said = _short(discreet(str(error)))
            if isinstance(error, sqlite3.Error):
                said = f"history ({self._store.file}): {said}"
            if self._error is None:
                self._error_since = time.time()
                self._note("chain", f"can't be read: {said}")
            self._outage.begin("chain can't be read error=%s", said)
            self._error = said
            # The chain may have another address after the outage, so locate it again.
            self._coordinator = Coordinator(self._chain)
        else:
            self._outage.end("chain answers again")
            if self._error is not None:
                self._note("chain", "can be read again")
            self._error = self._error_since = None
            self._updated_at = time.time()
        if self._verdicts is not None and self._contract is not None:
            # The store has audited rewards too, which the next look writes.
            self._is_behind |= self._verdicts.look(self._contract)
        return self._error is None

    def coordinator(self) -> Coordinator:
        """Return the client that was read last."""
        return self._coordinator

    def content(self) -> dict[str, Any]:
        """Return the answer of /api/swarm, described in docs/operations/host-a-swarm.md."""
        peers = self._tally.peers
        ranked = sorted(peers, key=lambda peer_id: (-(self._counted(peer_id) or 0), peer_id))
        return {
            **self.summary(),
            "rounds": [_round_entry(*each) for each in sorted(self._tally.rounds.items())],
            "peers": [self._told(peer_id, peers[peer_id]) for peer_id in ranked[:MAX_PEERS_SHOWN]],
        }

    def summary(self) -> dict[str, Any]:
        """Return /api/swarm without its lists of rounds and peers."""
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
            "num_peers": len(self._tally.peers),
            "ranked_by": self.ranked_by,
            "audit": None if self._verdicts is None else self._verdicts.told(),
        }

    @property
    def round(self) -> int | None:
        """The open round; None before the first reading."""
        return self._round

    @property
    def ranked_by(self) -> str:
        """The sum that peers are ranked by: total_reward, or audited_reward."""
        return "total_reward" if self._counts_unaudited else "audited_reward"

    def verdicts_of(self, peer_id: str) -> dict[str, int] | None:
        """Return the peer's number of rewards by verdict; None: not in a report."""
        return None if self._verdicts is None else self._verdicts.of(peer_id)

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
            "audit": self.verdicts_of(peer_id),
        }

    def _note(self, subject: str, text: str) -> None:
        try:
            with self._store.writing():
                self._store.add_event("chain", subject, text)
        except sqlite3.Error as error:
            log.warning("event not written error=%s", error)

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
        """True if blocks, or an audit's report, came since the contract's state was read."""

    def _known(self, round: int) -> dict[str, Any]:
        return {
            "contract": self._contract,
            "chain_id": self._chain_id,
            "round": round,
            "bootnodes": self._bootnodes[:_MAX_BOOTNODES],
            "updated_at": time.time(),
        }

    def _recall(self) -> None:
        """Load the data from before a restart, which is shown until the chain answers."""
        known = json.loads(self._store.mark("known") or "{}")
        self._contract, self._chain_id = known.get("contract"), known.get("chain_id")
        self._round, self._bootnodes = known.get("round"), known.get("bootnodes", [])
        self._updated_at = known.get("updated_at")

    def _read(self) -> None:
        chain = self._coordinator
        chain.ensure_checked()
        newest = chain.block_number()
        if self._newest is not None and self._is_another_chain(*self._newest, newest):
            log.warning("the chain was reset or reorganised: reading it again from the beginning")
            self._restart()
        self._contract, self._chain_id = chain.deployment.contract, chain.deployment.chain_id
        if self._newest is None:
            self._sync_store()
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
            self._store_sums(newest, round)
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
        """Return whether the last block that was read is gone.

        A killed chain may lose its last seconds, and other chains reorganise.
        """
        chain = self._coordinator
        return (
            chain.deployment.contract != self._contract
            or newest < block
            or chain.block_hash(block) != its_hash
        )

    def _sync_store(self) -> None:
        """Cut the store back to the newest block that this chain still has."""
        store, place = self._store, f"{self._chain_id}/{self._contract}"
        if store.mark("place") not in (None, place):
            store.rebuild("it is of another contract")
            store.is_new = False
        with store.writing():
            store.set_mark("place", place)
            blocks = store.blocks()
            if blocks and not self._has_block(blocks[0]):
                store.cut_back(next((each[0] for each in blocks if self._has_block(each)), -1))

    def _has_block(self, block: tuple[int, str | None]) -> bool:
        return self._coordinator.block_hash(block[0]) == block[1]

    def _read_log(self, newest: int, round: int) -> None:
        store = self._store
        if self._next is None:
            recent = self._first_block(round, MAX_ROUNDS)
            stored = {name: store.mark(f"next/{name}") for name in _EVENTS}
            if None in stored.values():
                oldest = self._first_block(round, MAX_STORED_ROUNDS)
                stored = dict.fromkeys(_EVENTS, oldest)
            self._next = {name: min(recent, block) for name, block in stored.items()}
        for name in _EVENTS:
            for first in range(self._next[name], newest + 1, _PIECE_BLOCKS):
                last = min(first + _PIECE_BLOCKS - 1, newest)
                events = list(self._coordinator.events(name, from_block=first, to_block=last))
                with store.writing():
                    stored_to = store.mark(f"next/{name}") or 0
                    for event in events:
                        if event.block >= stored_to:
                            store.take(event, round)
                    store.set_mark(f"next/{name}", max(stored_to, last + 1))
                for event in events:
                    self._tally.take(event, round)
                self._next[name] = last + 1
        self._tally.forget_old(round)

    def _store_sums(self, newest: int, round: int) -> None:
        """Store the contract's sums, and the time of the newest blocks with transactions."""
        store, peers = self._store, self._tally.peers
        audited = {peer_id: self._audited_reward(peer_id) for peer_id in peers}
        times = {
            block: self._coordinator.block_time(block) for block in store.untimed_blocks(_MAX_TIMES)
        }
        with store.writing():
            store.put_peers(peers, audited)
            store.forget_old(round)
            store.set_mark("known", json.dumps(self._known(round)))
            store.add_block(newest, self._newest[1] if self._newest else None)
            for block, at in times.items():
                store.set_time(block, at)

    def _first_block(self, round: int, num_rounds: int) -> int:
        """Return the first block of the log of the newest rounds."""
        first_round = round - num_rounds + 1
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
