"""The exchange of groups: serve our own to peers, and request, verify and score those of peers.

For each round or part of a round, a node draws a few peers at random and sends each a standing
request; the cost does not depend on the size of the swarm. The receiver chooses whom it asks, so no
peer can push data to it. Having no peers is a state (`training-alone`), never an error.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachetools import FIFOCache

from worker import settings
from worker.errors import SwarmError
from worker.records import Collected, Group, Place
from worker.runtime.state_dir import StateDir
from worker.swarm.context import SwarmContext
from worker.swarm.discovery.peer_table import MAX_PEERS_KNOWN
from worker.swarm.event_loop import Unanswered
from worker.swarm.exchange.archive import Archive
from worker.swarm.exchange.collector import Collecting, Scoring, Span
from worker.swarm.exchange.server import Serving
from worker.swarm.exchange.verify import Verifier
from worker.swarm.exchange.weights import (
    Fetched,
    Fetching,
    Offered,
    WeightServing,
    WeightTaking,
)
from worker.swarm.network import Network
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import groups_digest
from worker.swarm.status import State, SwarmStatus, Tally

log = logging.getLogger(__name__)

LINK_PATIENCE_SECONDS = 5.0
"""How long a round waits for a daemon that is being restarted."""
LOOP_PATIENCE_SECONDS = 15.0
"""How long a round waits for the event loop after the round's own end."""
MAX_ROUNDS_UNANSWERED = 5
"""Number of rounds in a row. If the event loop hangs for longer, the process must be restarted."""


@dataclass(frozen=True, slots=True)
class Published:
    """The groups that we serve for a part of a round.

    `groups` are those that peers and auditors get; `digest` (hexadecimal) is that of their signed
    record.
    """

    digest: str
    groups: tuple[Group, ...]


class Swarm:
    """The round loop's interface to the swarm.

    It is created, started, used and closed in one thread, which it never blocks for long.
    """

    def __init__(
        self,
        swarm: settings.Swarm,
        identity_file: Path,
        cache_dir: Path,
        verifier: Verifier,
    ) -> None:
        """Raise IdentityError if the identity is missing: it is never created here."""
        self._swarm = swarm
        self._verifier = verifier
        self._tally = Tally()
        self._context = SwarmContext(
            swarm,
            identity_file,
            cache_dir,
            environments=verifier.environments,
            families=verifier.families,
        )
        self._archive = Archive(StateDir(cache_dir).groups, swarm.audit_rounds)
        self._serving = Serving(self._context, self._tally, self._archive)
        self._weight_serving = WeightServing(self._context)
        self._weight_taking = WeightTaking(self._tally.reject)
        self._network = Network(
            self._context,
            self._serving.answer,
            self._serving.answer_audit,
            self._weight_serving.answer,
        )
        self._scoring = Scoring(verifier)
        self._used: FIFOCache[str, Place] = FIFOCache(MAX_PEERS_KNOWN)
        self._used_when_taken: dict[str, Place] = {}
        self._open: Collecting | None = None
        self._running: asyncio.Task[None] | None = None  # of `_open`
        self._heard: tuple[str, ...] = ()
        self._is_behind = False
        self._num_unanswered = 0  # rounds in a row
        self._last_state: State = "starting"

    def start(self) -> None:
        """Connect in the background, reconnecting forever.

        Raises ResourceError if the configured port is taken.
        """
        self._network.start()

    def join_through(self, multiaddrs: Sequence[str]) -> None:
        """Add bootnodes, such as those that the chain names."""
        self._network.join_through(multiaddrs)

    def peers(self) -> list[str]:
        """Return the peers that are known now."""
        return self._context.peers.known()

    def allow_registered(self, peer_ids: Collection[str]) -> None:
        """Set the peers that are registered on the chain, for `only_registered`."""
        self._network.allow_registered(peer_ids)

    def publish(
        self,
        round: int,
        groups: Sequence[Group],
        part: int = 0,
    ) -> Published:
        """Serve our groups of a part of `round`, the most useful first, from now on.

        Groups that peers would refuse, and those that do not fit into one message, are left out
        with a warning. On return the groups of part 0, which earn, are on disk for auditors. Raises
        ResourceError if they can't be written.
        """
        offered = self._acceptable(round, groups, part)
        sealed = messages.seal_groups(self._context.identity, round, offered, part)
        digest = groups_digest(sealed) if part else self._archive.put(round, sealed)
        frame = messages.encode_frame(messages.Kind.GROUPS, sealed)
        self._network.post(self._serving.put, Place(round, part), frame, len(offered))
        return Published(digest, tuple(offered))

    def ask(self, round: int, want: int) -> None:
        """Ask peers for their newest groups that we have not used, and return at once.

        They may be up to `max_rounds_behind` rounds older or newer than `round`. The requests stay
        open for collect_timeout_seconds or until `want` groups are valid; `take` returns these.
        """
        if want <= 0 or self._swarm.peers_per_round == 0:
            self._network.post(self._end_unasked)
        else:
            self._network.post(self._ask_on, round, want)

    def take(self, round: int) -> Collected:
        """Return the groups that arrived since the last call, without waiting for more.

        Like `collect`, it fails if the event loop does not answer.
        """
        try:
            collected = self._network.call(self._take(round), LOOP_PATIENCE_SECONDS)
        except Unanswered as error:
            self._go_without(round, error)
            return Collected()
        self._num_unanswered = 0
        return collected

    @property
    def used(self) -> dict[str, Place]:
        """The newest place of each peer whose groups we have used, as of the last `take`."""
        return self._used_when_taken

    def resume(self, used: Mapping[str, Place]) -> None:
        """Set the places that were used before a restart; call it before `start`."""
        self._used.update(used)

    def collect(self, round: int, want: int) -> Collected:
        """Request and verify groups of `round` from peers drawn at random.

        Blocks for collect_timeout_seconds at most. Returns as soon as `want` groups are valid, or
        when every peer that was drawn has answered or failed; at once if no peers are known.
        `heard` names all that answered in this round, with or without groups.

        If the event loop does not answer, the round is trained alone. Raises SwarmError after
        MAX_ROUNDS_UNANSWERED such rounds in a row, or if the loop is not running.
        """
        if want <= 0 or self._swarm.peers_per_round == 0:
            self._network.post(self._end_unasked)
            return Collected()
        try:
            seconds = self._swarm.collect_timeout_seconds + LOOP_PATIENCE_SECONDS
            collected = self._network.call(self._collect(round, want), seconds)
        except Unanswered as error:
            self._go_without(round, error)
            return Collected()
        self._num_unanswered = 0
        return collected

    def offer_weights(self, offered: Offered) -> None:
        """Serve these weights from now on, in the place of earlier ones."""
        self._network.post(self._weight_serving.put, offered)

    @property
    def is_sending_weights(self) -> bool:
        return self._weight_serving.is_busy

    def fetch_weights(
        self,
        peer_ids: Sequence[str],
        model: bytes,
        max_bytes: int,
        folder: Path,
    ) -> None:
        """Fetch weights from these peers in the background; `fetched_weights` returns them."""
        fetching = Fetching(self._context, self._network.connections, model, max_bytes, folder)
        self._weight_taking.expect()
        self._network.post(self._weight_taking.start, fetching, tuple(peer_ids))

    @property
    def is_fetching_weights(self) -> bool:
        return self._weight_taking.is_running

    def fetched_weights(self) -> list[Fetched]:
        """Return the weights that arrived since the last call."""
        return self._weight_taking.take()

    def distrust_weights(self, peer_id: str) -> None:
        """Count weights of a peer that could not be used, or were worse than ours."""
        self._tally.reject(peer_id, "weights")

    def note_planted(self, groups_by_peer: Mapping[str, int]) -> None:
        """Count groups with planted text (`trainer/peer_text.py`); draw their senders less."""
        for peer_id, count in groups_by_peer.items():
            log.warning("groups with planted text peer=%s groups=%d", peer_id, count)
        self._network.post(self._count_planted, dict(groups_by_peer))

    def status(self) -> SwarmStatus:
        context, tally = self._context, self._tally
        return SwarmStatus(
            state=self._state(),
            peer_id=context.identity.peer_id,
            peers_known=len(context.peers),
            peers_heard=self._heard,
            rejected=dict(tally.rejected),
            rejected_by_peer=dict(tally.rejected_by_peer),
            quarantines=dict(tally.quarantines),
            groups_offered=tally.groups["offered"],
            groups_fetched=tally.groups["fetched"],
            groups_verified=tally.groups["verified"],
            bytes_in=context.traffic["in"],
            bytes_out=context.traffic["out"],
            daemon_restarts=context.num_restarts,
            rounds_unanswered=tally.rounds_unanswered,
            other_versions=context.peers.other_versions(),
            addresses=tuple(f"{a}/p2p/{context.identity.peer_id}" for a in context.addresses),
            reach=context.reach,
            foreign_bootnodes=tuple(sorted(context.foreign_bootnodes)),
            quarantined=context.peers.quarantined(),
            last_error=context.last_error,
            newest_group_at=tally.newest_group_at,
            groups_handed_on=tally.groups["handed-on"],
            requests_refused=dict(context.refused),
            refused_by_peers=dict(tally.refused),
            versions=(f"exchange {messages.VERSION}", *context.own_record.environments),
        )

    def close(self) -> None:
        """End the daemon and the thread; takes a few seconds at most."""
        self._network.close()
        self._scoring.close()

    def _go_without(self, round: int, error: Unanswered) -> None:
        """Log and count that the exchange did not answer.

        Raises SwarmError if that happens MAX_ROUNDS_UNANSWERED times in a row.
        """
        self._num_unanswered += 1
        self._tally.rounds_unanswered += 1
        self._heard, self._context.last_error = (), str(error)
        log.warning(
            "exchange does not answer, training this round alone round=%d reason=%s", round, error
        )
        if self._num_unanswered >= MAX_ROUNDS_UNANSWERED:
            raise SwarmError(
                f"{self._num_unanswered} rounds in a row without an answer: {error}"
            ) from error

    def _state(self) -> State:
        if self._num_unanswered:
            return "training-alone"
        contact = self._context.has_contact
        if contact is None:
            return "starting"
        if not contact:
            return "training-alone"
        return "catching-up" if self._is_behind else "connected"

    def _acceptable(
        self,
        round: int,
        groups: Sequence[Group],
        part: int,
    ) -> list[Group]:
        """Return the groups that peers accept, as many as fit, in the given order."""
        limits, size = self._verifier.limits, 0
        kept: list[Group] = []
        refused = Counter[str]()
        for group in groups:
            reason = messages.find_excess(group, limits, part)
            group_bytes = messages.size_of(group)
            if reason is None and (
                len(kept) == limits.num_groups or size + group_bytes > messages.MAX_SERVED_BYTES
            ):
                reason = "no room"
            if reason is None:
                kept.append(group)
                size += group_bytes
            else:
                refused[reason] += 1
        if refused:
            log.warning(
                "groups not shared round=%d shared=%d not_shared=%d reasons=%s; they earn nothing:"
                " lower environment.tasks_per_round, generation.num_generations or"
                " generation.max_completion_length",
                round,
                len(kept),
                len(groups) - len(kept),
                dict(refused),
            )
        return kept

    # In the event loop

    def _count_planted(self, groups_by_peer: Mapping[str, int]) -> None:
        for peer_id, count in groups_by_peer.items():
            for _ in range(count):
                self._tally.reject(peer_id, "planted")
            self._context.peers.distrust(peer_id)

    def _end_unasked(self) -> None:
        """End a round in which no peer was asked; greetings show whether there are peers."""
        self._heard = ()
        if not self._context.has_contact:
            self._context.fall_silent()
        self._log_state()

    async def _collect(self, round: int, want: int) -> Collected:
        started = time.monotonic()
        collecting = self._make_collecting(round, Span(round, round), want)
        await self._run(collecting)
        waited = max(0.0, time.monotonic() - started - collecting.seconds_scoring)
        # The time is up: requests that are still open were not answered.
        is_silent = not any(map(self._context.peers.is_open, collecting.heard))
        collected = collecting.take(waited)
        self._is_behind = not collected.groups
        self._note(round, collecting, collected, is_silent)
        return collected

    def _ask_on(self, round: int, want: int) -> None:
        behind = self._swarm.max_rounds_behind
        span = Span(max(0, round - behind), round + behind, self._used)
        if self._open is None:
            self._open = self._make_collecting(round, span, want, stays=True)
        else:
            deadline = time.monotonic() + self._swarm.collect_timeout_seconds
            self._open.renew(round, span, want, deadline)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run(self._open))

    async def _take(self, round: int) -> Collected:
        if self._open is None or self._running is None:
            return Collected()
        if self._running.done():
            self._running.result()
        is_silent, collected = self._open.is_silent, self._open.take()
        self._used_when_taken = dict(self._used)
        self._is_behind = not collected.groups and (self._is_behind or is_silent)
        self._note(round, self._open, collected, is_silent)
        return collected

    def _make_collecting(
        self,
        round: int,
        span: Span,
        want: int,
        stays: bool = False,
    ) -> Collecting:
        return Collecting(
            self._context,
            self._network.connections,
            self._serving,
            self._scoring,
            self._tally,
            round,
            span,
            want,
            deadline=time.monotonic() + self._swarm.collect_timeout_seconds,
            num_peers=self._swarm.peers_per_round,
            stays=stays,
        )

    async def _run(self, collecting: Collecting) -> None:
        """Wait some seconds if the daemon is being restarted, then collect."""
        if not self._context.is_up and self._context.num_restarts:
            await _wait_for(
                self._context.link_up,
                min(LINK_PATIENCE_SECONDS, self._swarm.collect_timeout_seconds),
            )
        await collecting.run()

    def _note(
        self,
        round: int,
        collecting: Collecting,
        collected: Collected,
        is_silent: bool,
    ) -> None:
        """Update the state of the swarm part, and log the collected groups."""
        context = self._context
        self._heard = collected.heard
        if is_silent:
            context.fall_silent()
        self._log_state()
        log.info(
            "groups collected round=%d asked=%d heard=%d groups=%d rejected=%d waiting=%.1f"
            " state=%s newest_group_seconds=%s bytes_in=%d bytes_out=%d",
            round,
            len(collecting.drawn),
            len(self._heard),
            len(collected.groups),
            sum(collected.rejected.values()),
            collected.seconds_waiting,
            self._state(),
            self._tally.newest_group_seconds,
            context.traffic["in"],
            context.traffic["out"],
        )

    def _log_state(self) -> None:
        state = self._state()
        if state != self._last_state:
            level = logging.INFO if state == "connected" else logging.WARNING
            log.log(level, "swarm state=%s peers_known=%d", state, len(self._context.peers))
            self._last_state = state


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        log.debug("still waiting")
