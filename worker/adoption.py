"""Take a peer's weights when they are better than ours, and offer ours to peers.

A node that earns far less than its peers fetches the weights of the best of them, in the background
of its rounds. Nobody is believed: what arrives must fit our model, and is tried against our own
weights on held-out tasks that nobody else knows. It is taken only if it earns more beyond the
noise. Then the optimizer starts afresh, and the next checkpoint has the new weights; a node that
dies before it goes on with the old ones.
"""

import hashlib
import json
import logging
import math
import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from worker import evaluation, settings, trial
from worker.environments import Environment
from worker.evaluation import Asked, Estimate
from worker.records import ScoredGroup
from worker.runtime.state_dir import StateDir
from worker.swarm.exchange import weights as weight_exchange
from worker.swarm.exchange.weights import Fetched
from worker.swarm.swarm import Swarm
from worker.trainer import weight_sets
from worker.trainer.trainer import Trainer
from worker.trainer.weight_sets import WeightSet

log = logging.getLogger(__name__)

RECENT_ROUNDS = 8
MIN_ROUNDS = 3
"""Rounds of our own, and groups of a peer, before rewards are compared."""
MARGIN = 0.1
"""A peer must earn this much more, in mean reward, before its weights are fetched."""
MAX_SOURCES = 3
"""Peers whose weights are fetched for one trial."""
PAUSE_ROUNDS = 8
"""After a trial; doubled after each that took nothing."""
LONGEST_PAUSE_ROUNDS = 256
TRIAL_TASKS = 48
"""Held-out tasks of one trial, of all families together."""
TRIAL_SECONDS = 300.0
"""For our own weights, and for each candidate."""
OFFER_SECONDS = 600.0
"""An offer stays for at least this long, so that slow peers can complete it."""
_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Weights to try: those of `peer_id`, or (None) an average."""

    what: str
    peer_id: str | None
    weights: WeightSet


@dataclass
class Adoption:
    """The weights that one node offers and takes. Used from the node's thread only.

    `counts`: offered, fetched, unusable, worse, and taken sets of weights since the start.
    """

    swarm: Swarm
    trainer: Trainer
    environment: Environment
    generation: settings.Generation
    state_dir: Path
    progress: Callable[[], None] = lambda: None
    counts: "Counter[str]" = field(default_factory=Counter)
    _own: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_ROUNDS))
    _peers: dict[str, deque[float]] = field(default_factory=dict)
    _rounds_until_next: int = 0
    _pause: int = PAUSE_ROUNDS
    _offered_at: float = -math.inf
    _is_fetching: bool = False

    def __post_init__(self) -> None:
        self._folder = StateDir(self.state_dir).weights
        self.model = model_digest(self.trainer)
        sizes = [parameter.numel() for parameter in self.trainer.parameters.values()]
        self._max_bytes = 4 * sum(sizes) + _HEADER_BYTES + 256 * len(sizes)

    def offer(
        self,
        weights: Path,
        rounds_trained: int,
    ) -> None:
        """Offer a checkpoint's file of weights, unless the last offer is young or being sent."""
        now = time.monotonic()
        if now - self._offered_at < OFFER_SECONDS or self.swarm.is_sending_weights:
            return
        self._offered_at = now
        try:
            offered = self._keep(weights, rounds_trained)
        except OSError as error:
            log.warning("weights not offered file=%s reason=%s", weights, error)
            return
        if offered is not None:
            self.swarm.offer_weights(offered)
            self.counts["offered"] += 1

    def _keep(
        self,
        weights: Path,
        rounds_trained: int,
    ) -> weight_exchange.Offered | None:
        """Return the offer of a file that outlives its checkpoint. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob("own-*.safetensors"):
            old.unlink()
        # A hard link, which takes no space.
        file = self._folder / f"own-{rounds_trained:08d}.safetensors"
        os.link(weights, file)
        return weight_exchange.describe(self.model, file, rounds_trained)

    def after_round(
        self,
        local: Sequence[ScoredGroup],
        external: Sequence[ScoredGroup],
    ) -> bool:
        """See a round's groups; return whether weights that had arrived were taken."""
        self._see(local, external)
        if self._is_fetching:
            return self._try_fetched()
        self._rounds_until_next -= 1
        better = self._find_better() if self._rounds_until_next <= 0 else []
        if better:
            log.info("far behind, fetching weights own=%.3f peers=%s", _mean(self._own), better)
            self.swarm.fetch_weights(better, self.model, self._max_bytes, self._folder)
            self._is_fetching = True
        return False

    def _see(
        self,
        local: Sequence[ScoredGroup],
        external: Sequence[ScoredGroup],
    ) -> None:
        if local:
            self._own.append(_mean([group.mean_reward for group in local]))
        for group in external:
            if group.peer_id is not None:
                recent = self._peers.setdefault(group.peer_id, deque(maxlen=RECENT_ROUNDS))
                recent.append(group.mean_reward)

    def _find_better(self) -> list[str]:
        """Return the peers that earn MARGIN more than we do, the best first."""
        if len(self._own) < MIN_ROUNDS:
            return []
        floor = _mean(self._own) + MARGIN
        means = {p: _mean(r) for p, r in self._peers.items() if len(r) >= MIN_ROUNDS}
        better = [peer for peer, mean in means.items() if mean >= floor]
        return sorted(better, key=lambda peer: means[peer], reverse=True)[:MAX_SOURCES]

    def _try_fetched(self) -> bool:
        if self.swarm.is_fetching_weights:
            return False
        self._is_fetching = False
        fetched = self.swarm.fetched_weights()
        self.counts["fetched"] += len(fetched)
        candidates = list(self._candidates(fetched))
        taken = self._choose(candidates) if candidates else None
        for each in fetched:
            each.file.unlink(missing_ok=True)
        self._pause = PAUSE_ROUNDS if taken else min(2 * self._pause, LONGEST_PAUSE_ROUNDS)
        self._rounds_until_next = self._pause
        if taken is None:
            return False
        weight_sets.adopt(self.trainer, taken.weights)
        self.counts["taken"] += 1
        self._own.clear()  # they were earned by other weights
        return True

    def _candidates(self, fetched: Sequence[Fetched]) -> Iterator[_Candidate]:
        """Yield the usable ones of what has arrived, and their averages; count the others."""
        usable: list[_Candidate] = []
        for each in fetched:
            try:
                weights = weight_sets.read(each.file)
                misfit = weight_sets.find_misfit(self.trainer, weights)
            except ValueError as error:
                misfit = str(error)
            if misfit:
                self._refuse(each.peer_id, "unusable", misfit)
            else:
                usable.append(_Candidate(f"{each.peer_id}'s", each.peer_id, weights))
        yield from usable
        if not usable:
            return
        sets = [each.weights for each in usable]
        own = weight_sets.current(self.trainer)
        yield _Candidate("average with ours", None, weight_sets.average([own, *sets]))
        if len(sets) > 1:
            yield _Candidate("average of the peers'", None, weight_sets.average(sets))

    def _choose(self, candidates: Sequence[_Candidate]) -> _Candidate | None:
        """Return the best candidate that earns more than our weights beyond the noise, or None."""
        asked = [(name, self.environment.levels.get(name)) for name in self.environment.names]
        # Drawn for this trial: a peer can't have trained on them.
        seed = random.SystemRandom().randrange(1 << 30)
        ours = self._rewards(asked, seed)
        best: tuple[float, _Candidate] | None = None
        for candidate in candidates:
            found = self._compare(candidate, ours, asked, seed)
            if found is None:
                continue
            log.info(
                "weights tried which=%s gain=%.3f low=%.3f high=%.3f",
                candidate.what,
                found.value,
                found.low,
                found.high,
            )
            if found.low > 0 and (best is None or found.value > best[0]):
                best = found.value, candidate
            elif found.low <= 0 and candidate.peer_id is not None:
                self._refuse(candidate.peer_id, "worse", "no better than ours beyond noise")
        if best is not None:
            log.info("weights taken which=%s gain=%.3f", best[1].what, best[0])
        return best[1] if best is not None else None

    def _compare(
        self,
        candidate: _Candidate,
        ours: trial.Rewards,
        asked: Sequence[Asked],
        seed: int,
    ) -> Estimate | None:
        """Return how much more a candidate earns per task; None if its outputs are not finite."""
        with weight_sets.tried(self.trainer, candidate.weights):
            if self.trainer.is_sound():
                return trial.difference(ours, self._rewards(asked, seed))
        if candidate.peer_id is not None:
            reason = "the model's outputs are not finite with them"
            self._refuse(candidate.peer_id, "unusable", reason)
        return None

    def _rewards(
        self,
        asked: Sequence[Asked],
        seed: int,
    ) -> trial.Rewards:
        scores = evaluation.evaluate(
            self.trainer.policy,
            self.environment,
            self.generation,
            asked,
            math.ceil(TRIAL_TASKS / len(asked)),
            seed,
            until=time.monotonic() + TRIAL_SECONDS,
            progress=self.progress,
        )
        return trial.rewards_of(scores)

    def _refuse(
        self,
        peer_id: str,
        kind: str,
        reason: str,
    ) -> None:
        """Count weights that are not taken; forget the rewards of their peer."""
        self.counts[kind] += 1
        self._peers.pop(peer_id, None)
        if kind == "unusable":
            self.swarm.distrust_weights(peer_id)
        log.warning("weights not taken peer=%s kind=%s reason=%s", peer_id, kind, reason)


def model_digest(trainer: Trainer) -> bytes:
    """Return what identifies the weights that a trainer can take: origin, names and shapes."""
    shapes = [(name, list(p.shape)) for name, p in trainer.parameters.items()]
    return hashlib.sha256(json.dumps([trainer.origin, shapes]).encode()).digest()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
