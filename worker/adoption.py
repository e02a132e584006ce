"""Take a peer's weights when they are better than ours, and offer ours to peers.

A node that earns far less than its peers fetches the weights of the best of them in the background
while it trains. No peer is trusted: the fetched weights must fit our model, and are compared with
our own weights on held-out tasks that no peer knows. Such a trial is spread over rounds, with a few
tasks in each, and ends as soon as the result is clear. Weights are taken only if they earn more by
a statistically significant margin. The optimizer's moments are then reset, and the next checkpoint
contains the new weights; a node that dies before that checkpoint resumes with its old weights.
"""

import functools
import hashlib
import itertools
import json
import logging
import math
import os
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from worker import evaluation, settings, trial
from worker.environments import Environment
from worker.evaluation import Asked
from worker.records import ScoredGroup
from worker.runtime.state_dir import StateDir
from worker.swarm.exchange import weights as weight_exchange
from worker.swarm.exchange.weights import Fetched
from worker.swarm.swarm import Swarm
from worker.trainer import weight_differences, weight_sets
from worker.trainer.trainer import Trainer
from worker.trainer.weight_differences import WeightsOnDisk
from worker.trainer.weight_sets import WeightSet

log = logging.getLogger(__name__)

OWN_GROUPS = 72
"""Number of our own newest groups whose rewards are compared."""
PEERS_GROUPS = 48
"""Number of the newest groups of all peers together whose rewards are compared: about four rounds.
If we are slow, peers have learned much since older ones."""
MIN_GROUPS = 9
"""Smallest number of our own groups, and of all peers', whose rewards are compared."""
PRIOR_GROUPS = 9
"""Weight, in groups, of the mean over all peers in the estimate for one peer. A slow node has few
groups of each, so that most of their difference is luck."""
MARGIN = 0.1
"""A peer must earn this much more, in mean reward, before weights are fetched."""
MAX_SOURCES = 3
"""Peers whose weights are fetched for one trial."""
PAUSE_ROUNDS = 8
"""Rounds after a trial in which no weights were taken; doubled each time, until some are taken."""
LONGEST_PAUSE_ROUNDS = 256
BLOCK_TASKS = 32
"""Number of held-out tasks that our own weights and one candidate answer in a round."""
TASK_ANSWERS = 2
"""Answers to each task. More tasks with fewer answers tell more for the same work."""
TRIAL_TASKS = 384
"""A candidate that is not significantly better after this many tasks is dropped."""
OFFER_SECONDS = 600.0
"""Shortest time before an offer is replaced, so that slow peers can complete their transfer."""
SMALL_DIFFERENCE = 0.7
"""A difference is offered instead of the file if it is smaller than this share of it."""
MAX_ROUNDING_LOSS = 0.1
"""Largest rounding errors in such a difference, as a share of what training has changed. Updates of
float32 weights may be smaller than a step of bfloat16; peers would get the untouched model."""
_HEADER_BYTES = 1 << 16
_UNPACKED = ".unpacked"


class _Earned(NamedTuple):
    """The mean reward of a group. `level` is -1 if `family` has no levels."""

    family: str
    level: int
    reward: float


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Weights to try. `what` names them in the log; `peer_id` is their owner, None: an average.

    `make` loads or computes them, because they are not kept in memory while the node trains.
    """

    what: str
    peer_id: str | None
    make: Callable[[], WeightSet]


@dataclass
class _Trial:
    """A trial in progress: the fetched files, and the candidates that are left.

    `gains`: the first candidate's reward minus that of our own weights, one value per task.
    """

    fetched: Sequence[Fetched]
    candidates: list[_Candidate]
    gains: list[float] = field(default_factory=list)

    def drop(self) -> None:
        """Go on with the next candidate."""
        del self.candidates[0]
        self.gains = []


@dataclass
class Adoption:
    """The exchange of weights of one node. Used from the node's thread only.

    `counts`: the numbers of sets of weights since the start that were offered, fetched, unusable,
    worse and taken.
    """

    swarm: Swarm
    trainer: Trainer
    environment: Environment
    generation: settings.Generation
    state_dir: Path
    progress: Callable[[], None] = lambda: None
    counts: "Counter[str]" = field(default_factory=Counter)
    _own: deque[_Earned] = field(default_factory=lambda: deque(maxlen=OWN_GROUPS))
    _peers: deque[tuple[str, _Earned]] = field(default_factory=lambda: deque(maxlen=PEERS_GROUPS))
    _rounds_until_next: int = 0
    _pause: int = PAUSE_ROUNDS
    _offered_at: float = -math.inf
    _is_fetching: bool = False
    _trial: _Trial | None = None

    def __post_init__(self) -> None:
        self._folder = StateDir(self.state_dir).weights
        self._rng = random.SystemRandom()
        self._base = _find_base(self.trainer)
        sizes = [parameter.numel() for parameter in self.trainer.parameters.values()]
        self._max_bytes = 4 * sum(sizes) + _HEADER_BYTES + 256 * len(sizes)

    @functools.cached_property
    def model(self) -> bytes:
        """Digest of the model, which peers compare. Raises OSError if its files can't be read."""
        return model_digest(self.trainer, self._base)

    def offer(
        self,
        weights: Path,
        rounds_trained: int,
    ) -> None:
        """Offer a checkpoint's weights, unless the last offer is recent or is being sent now."""
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
        """Return an offer of the weights in a file that outlives the checkpoint. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob("own-*"):
            old.unlink()
        file = self._keep_difference(weights, self._folder / f"own-{rounds_trained:08d}.difference")
        if file is None:
            file = self._folder / f"own-{rounds_trained:08d}.safetensors"
            os.link(weights, file)  # takes no space
        return weight_exchange.describe(self.model, file, rounds_trained)

    def _keep_difference(
        self,
        weights: Path,
        file: Path,
    ) -> Path | None:
        """Write a checkpoint's difference to the untouched weights, and return its file.

        None: there are no untouched weights, or the difference is not much smaller than the
        checkpoint, or rounding loses too much, or it can't be made.
        """
        if self._base is None:
            return None
        unfinished = file.with_suffix(".unfinished")
        started = time.monotonic()
        try:
            checkpoint = weight_differences.open_file(weights)
            loss = weight_differences.pack(checkpoint, self._base, unfinished).loss
            num_bytes, whole = unfinished.stat().st_size, weights.stat().st_size
            if num_bytes < SMALL_DIFFERENCE * whole and loss <= MAX_ROUNDING_LOSS:
                seconds = time.monotonic() - started
                log.info("weights packed bytes=%d of=%d seconds=%.1f", num_bytes, whole, seconds)
                return unfinished.rename(file)
            log.debug("difference not offered bytes=%d of=%d loss=%.2f", num_bytes, whole, loss)
        except OSError as error:
            log.warning("difference not written, offering the whole file reason=%s", error)
        except ValueError as error:
            log.debug("difference not offered reason=%s", error)
        unfinished.unlink(missing_ok=True)
        return None

    def before_step(
        self,
        local: Sequence[ScoredGroup],
        external: Sequence[ScoredGroup],
    ) -> None:
        """Note the rewards of a round; fetch weights of peers that earn much more than we do.

        It is called before the step, so that the weights arrive while we train.
        """
        self._see(local, external)
        if self._is_fetching or self._trial is not None:
            return
        self._rounds_until_next -= 1
        better = self._find_better() if self._rounds_until_next <= 0 else []
        if better:
            log.info("peers earn much more, fetching their weights peers=%s", better)
            self._fetch(better)

    def after_step(self) -> bool:
        """Try weights that have arrived with some more tasks; return whether they were taken."""
        if self._is_fetching and not self.swarm.is_fetching_weights:
            self._is_fetching = False
            self._begin_trial(self.swarm.fetched_weights())
        return self._trial is not None and self._go_on(self._trial)

    def _fetch(self, peer_ids: Sequence[str]) -> None:
        try:
            model = self.model
        except OSError as error:
            log.warning("weights not fetched reason=%s", error)
            self._rounds_until_next = PAUSE_ROUNDS
            return
        self.swarm.fetch_weights(peer_ids, model, self._max_bytes, self._folder)
        self._is_fetching = True

    def _see(
        self,
        local: Sequence[ScoredGroup],
        external: Sequence[ScoredGroup],
    ) -> None:
        self._own.extend(map(self._earned, local))
        self._peers.extend(
            (group.peer_id, self._earned(group)) for group in external if group.peer_id is not None
        )

    def _earned(self, group: ScoredGroup) -> _Earned:
        level = self.environment.level_of(group.task)
        return _Earned(group.task.family, -1 if level is None else level, group.mean_reward)

    def _find_better(self) -> list[str]:
        """Return the peers whose weights are worth a trial, the best first.

        The best earns MARGIN more than we do, and the others at least half of that: the average of
        several is usually better than each of them. Empty if none earns that much more.
        """
        gains: defaultdict[str, list[float]] = defaultdict(list)
        for peer_id, theirs in self._peers:
            if (gain := self._gain_of(theirs)) is not None:
                gains[peer_id].append(gain)
        of_all = list(itertools.chain.from_iterable(gains.values()))
        if min(len(self._own), len(of_all)) < MIN_GROUPS:
            return []
        prior = PRIOR_GROUPS * _mean(of_all)
        estimates = {
            peer_id: (math.fsum(of_peer) + prior) / (len(of_peer) + PRIOR_GROUPS)
            for peer_id, of_peer in gains.items()
        }
        if max(estimates.values()) < MARGIN:
            return []
        better = [peer_id for peer_id, gain in estimates.items() if gain >= MARGIN / 2]
        return sorted(better, key=lambda peer_id: estimates[peer_id], reverse=True)[:MAX_SOURCES]

    def _gain_of(self, theirs: _Earned) -> float | None:
        """Return how much more a peer's group earned than ours; None: it can't be compared.

        It is compared with ours of the same family at the same or an easier level: earning more on
        harder tasks shows a better model, on easier tasks it need not.
        """
        ours = [
            own.reward
            for own in self._own
            if own.family == theirs.family and own.level <= theirs.level
        ]
        return theirs.reward - _mean(ours) if ours else None

    def _begin_trial(self, fetched: Sequence[Fetched]) -> None:
        self.counts["fetched"] += len(fetched)
        for old in self._folder.glob(f"*{_UNPACKED}"):  # of a trial that a restart ended
            old.unlink()
        whole = [each for each in map(self._unpack, fetched) if each is not None]
        self._trial = _Trial(whole, self._candidates(whole))

    def _unpack(self, fetched: Fetched) -> Fetched | None:
        """Replace a difference by a safetensors file; return what is not a difference as it is.

        It is unpacked once, and not again for every block of a trial. None if that fails; the peer
        is blamed only if its file is the reason.
        """
        try:
            if self._base is None or not weight_differences.is_difference(fetched.file):
                return fetched
            whole = fetched.file.with_suffix(_UNPACKED)
            weight_sets.unpack(self.trainer, fetched.file, self._base, whole)
        except ValueError as error:
            self._refuse(fetched.peer_id, "unusable", str(error))
        except OSError as error:
            log.warning("weights not tried peer=%s reason=%s", fetched.peer_id, error)
        else:
            fetched.file.unlink()
            return replace(fetched, file=whole)
        fetched.file.unlink(missing_ok=True)
        return None

    def _candidates(self, fetched: Sequence[Fetched]) -> list[_Candidate]:
        """Return the usable sets of weights and their averages; count the unusable ones."""
        usable: list[_Candidate] = []
        make: Callable[[], WeightSet]
        for each in fetched:
            try:
                misfit = weight_sets.find_misfit(self.trainer, weight_sets.read(each.file))
            except ValueError as error:
                misfit = str(error)
            if misfit:
                self._refuse(each.peer_id, "unusable", misfit)
            else:
                make = functools.partial(weight_sets.read, each.file)
                usable.append(_Candidate(f"{each.peer_id}'s", each.peer_id, make))

        def average(with_ours: bool) -> WeightSet:
            own = [weight_sets.current(self.trainer)] if with_ours else []
            return weight_sets.average([*own, *(each.make() for each in usable)])

        candidates = list(usable)
        if len(usable) > 1:  # tried first: the average is usually better than each of them
            make = functools.partial(average, with_ours=False)
            candidates.insert(0, _Candidate("average of the peers'", None, make))
        if usable:
            make = functools.partial(average, with_ours=True)
            candidates.append(_Candidate("average with ours", None, make))
        return candidates

    def _go_on(self, running: _Trial) -> bool:
        """Try a block of tasks with the first candidate; return whether it was taken."""
        if running.candidates and self._try_block(running):
            taken = running.candidates[0]
            weight_sets.adopt(self.trainer, taken.make())
            self.counts["taken"] += 1
            self._own.clear()  # they were earned by other weights
            self._end_trial(running)
            # Peers that were so far ahead may be ahead again soon, so the next trial need not wait.
            self._pause, self._rounds_until_next = PAUSE_ROUNDS, 0
            log.info("weights taken which=%s gain=%.3f", taken.what, _mean(running.gains))
            return True
        if not running.candidates:
            self._end_trial(running)
            self._rounds_until_next = self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_ROUNDS)
        return False

    def _end_trial(self, ended: _Trial) -> None:
        for each in ended.fetched:
            each.file.unlink(missing_ok=True)
        self._trial = None

    def _try_block(self, running: _Trial) -> bool:
        """Let our own weights and the first candidate answer more tasks.

        Returns whether to take it: it earns significantly more than our weights. A candidate is
        dropped if it earns no more than ours on average, or if the result is unclear after
        TRIAL_TASKS.
        """
        candidate = running.candidates[0]
        families = self._rng.sample(self.environment.names, k=len(self.environment.names))
        asked = [(name, self.environment.levels.get(name)) for name in families[:BLOCK_TASKS]]
        # The tasks are drawn for this block, so a peer can't have trained on them.
        seed = self._rng.randrange(1 << 30)
        ours = self._rewards(asked, seed)
        with weight_sets.tried(self.trainer, candidate.make()):
            theirs = self._rewards(asked, seed) if self.trainer.is_sound() else None
        if theirs is None:
            self._give_up(running, "unusable", "the model's outputs are not finite with them")
            return False
        running.gains += trial.pair_up(ours, theirs)
        num_tasks, gain = len(running.gains), trial.estimate(running.gains)
        log.info(
            "weights tried which=%s tasks=%d gain=%.3f low=%.3f high=%.3f",
            candidate.what,
            num_tasks,
            gain.value,
            gain.low,
            gain.high,
        )
        if gain.low > 0:
            return True
        if num_tasks >= TRIAL_TASKS or (num_tasks >= trial.MIN_TASKS and gain.value <= 0):
            self._give_up(running, "worse", "no better than ours beyond noise")
        return False

    def _give_up(
        self,
        running: _Trial,
        kind: str,
        reason: str,
    ) -> None:
        """Drop the first candidate; count it by `kind` if it is a peer's."""
        peer_id = running.candidates[0].peer_id
        running.drop()
        if peer_id is not None:
            self._refuse(peer_id, kind, reason)

    def _rewards(
        self,
        asked: Sequence[Asked],
        seed: int,
    ) -> trial.Rewards:
        scores = evaluation.evaluate(
            self.trainer.policy,
            self.environment,
            self.generation.model_copy(update={"num_generations": TASK_ANSWERS}),
            asked,
            math.ceil(BLOCK_TASKS / len(asked)),
            seed,
            progress=self.progress,
        )
        return trial.rewards_of(scores)

    def _refuse(
        self,
        peer_id: str,
        kind: str,
        reason: str,
    ) -> None:
        """Count a peer's weights that were not taken, and forget its rewards."""
        self.counts[kind] += 1
        others = [heard for heard in self._peers if heard[0] != peer_id]
        self._peers = deque(others, PEERS_GROUPS)
        if kind == "unusable":
            self.swarm.distrust_weights(peer_id)
        log.warning("weights not taken peer=%s kind=%s reason=%s", peer_id, kind, reason)


def model_digest(
    trainer: Trainer,
    base: WeightsOnDisk | None = None,
) -> bytes:
    """Return a digest of origin, names and shapes of the weights that a trainer can take.

    With `base`, the untouched weights, peers have the same digest only if theirs are the same and
    they understand differences too. Raises OSError if `base` can't be read.
    """
    shapes = [(name, list(p.shape)) for name, p in trainer.parameters.items()]
    described = [trainer.origin, shapes]
    if base is not None:
        described.append({"differences": 1, "base": weight_differences.digest_of(base)})
    return hashlib.sha256(json.dumps(described).encode()).digest()


def _find_base(trainer: Trainer) -> WeightsOnDisk | None:
    """Return the untouched weights; None: differences are neither offered nor taken."""
    try:
        return weight_differences.find_base(trainer)
    except ValueError as error:
        log.debug("weights are exchanged as they are reason=%s", error)
        return None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
