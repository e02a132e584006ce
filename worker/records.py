"""Records that the parts of a node pass to each other and that nodes send to each other.

Plain data: no behaviour, no network, no torch. A task is sent as a recipe, never as text: the
receiver regenerates question and answer itself and scores the completions itself, so a peer can't
lie about either (docs/decisions/0001).
"""

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

MAX_PARTS = 256
"""Largest number of parts of a round."""
MAX_PART_TASKS = 256
"""Largest number of tasks of a part, whose indices begin at `part * MAX_PART_TASKS`. The first part
may have more if the node trains alone, because peers accept no more."""
REWARD_STD_FLOOR = 0.2
"""Smallest standard deviation of a group's rewards that differ as right and wrong answers do.
One right answer in eight gives 0.35; half 0.01 and half 0.05 give 0.02."""

BetState = Literal["planned", "sent", "confirmed", "claiming", "paid", "lost", "missed", "skipped"]
"""The state of a node's bet in the prediction market (worker/market/journal.py)."""


class Place(NamedTuple):
    """A part of a round. Places are ordered by time.

    Part 0 is answered, exchanged and rewarded once in each round. A node answers further parts
    while the round is still open; they earn nothing (docs/decisions/0033).
    """

    round: int
    part: int

    def after(self) -> "Place":
        """Return the first place that is later."""
        return Place(self.round, self.part + 1)


@dataclass(frozen=True, slots=True)
class Task:
    """The recipe of one question.

    `config_digest` names a configuration of `family` that both sides know (environments compute
    it); with `seed` and `index` it makes the same question and answer on every machine.
    """

    family: str
    config_digest: str
    seed: int
    index: int


@dataclass(frozen=True, slots=True)
class Group:
    """The completions of one peer for one task in one round, as they travel.

    Completions are decoded text without the prompt.
    """

    task: Task
    completions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer of our own policy.

    `token_ids` (T,) are the sampled tokens, including the end token if there was one; `logprobs`
    (T,) are their log-probabilities (worker/policy/engines/engine.py says of which distribution),
    or empty if the sampler reported none; `truncated`: the answer has no end token.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    truncated: bool


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion that was scored here.

    `reward` in [0, 1] was computed here, never received. `sampled`: the tokens of our own policy;
    None for a peer's completion, whose text is tokenised here. `credit` replaces the reward in the
    advantages of a group whose rewards are all 0 (trainer/credit.py), and is used for nothing else.
    """

    text: str
    reward: float
    sampled: Completion | None = None
    credit: float = 0.0


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group that can be trained on: ours (`peer_id` None), or a peer's that was verified."""

    task: Task
    question: str
    rollouts: tuple[Rollout, ...]
    peer_id: str | None = None

    @property
    def completions(self) -> tuple[str, ...]:
        return tuple(rollout.text for rollout in self.rollouts)

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(rollout.reward for rollout in self.rollouts)

    @property
    def credits(self) -> tuple[float, ...]:
        return tuple(rollout.credit for rollout in self.rollouts)

    @property
    def sampled(self) -> tuple[Completion, ...]:
        """The completions that our own policy sampled: all of them, or none of a peer's group."""
        return tuple(rollout.sampled for rollout in self.rollouts if rollout.sampled is not None)

    @property
    def mean_reward(self) -> float:
        return sum(self.rewards) / len(self.rewards)

    @property
    def signal(self) -> float:
        """Return how much the group teaches, 0 to 1; 1 if its rewards differ as right and wrong do.

        Small differences, such as 0.05 for a readable wrong answer, would otherwise outweigh right
        answers, because advantages are divided by the rewards' standard deviation. 0 for a group
        that can't be learned from: of one answer, or with a reward that is not finite.
        """
        if len(self.rollouts) < 2 or not all(map(math.isfinite, self.rewards)):
            return 0.0
        return min(1.0, statistics.stdev(self.rewards) / REWARD_STD_FLOOR)

    @property
    def has_signal(self) -> bool:
        """Return whether the rewards differ.

        A group whose rewards are all equal has zero advantage and teaches nothing.
        """
        rewards = self.rewards
        return max(rewards) > min(rewards)

    @property
    def teaches(self) -> bool:
        """Return whether a training step can use it: its rewards or its credits differ."""
        return self.has_signal or max(self.credits) > min(self.credits)


@dataclass(frozen=True, slots=True)
class Collected:
    """The result of a round's exchange.

    `rejected` counts dropped groups by reason; `heard` lists the peers that answered. `behind`:
    number of groups by how many rounds older than the current one they are. `seconds_waiting`: time
    spent waiting for peers; the rest of the exchange is scoring.
    """

    groups: tuple[ScoredGroup, ...] = ()
    heard: tuple[str, ...] = ()
    rejected: dict[str, int] = field(default_factory=dict)
    behind: dict[int, int] = field(default_factory=dict, compare=False)
    # Not compared, because a measured time is never the same twice.
    seconds_waiting: float = field(default=0.0, compare=False)

    def plus(self, later: "Collected") -> "Collected":
        """Return this together with a later result of the same step, sorted by sender and index."""
        return Collected(
            tuple(sorted((*self.groups, *later.groups), key=sender_and_index)),
            tuple(sorted({*self.heard, *later.heard})),
            dict(Counter(self.rejected) + Counter(later.rejected)),
            dict(Counter(self.behind) + Counter(later.behind)),
            self.seconds_waiting + later.seconds_waiting,
        )


@dataclass(frozen=True, slots=True)
class StepQuality:
    """Figures of a step that show how healthy the training is, with TRL's names ("/" is "_").

    None: not measured. The importance sampling ratio and the difference of log-probabilities
    compare the trainer, before the step, with the engine that sampled, over our own completions
    that were trained on; `sampling_kl` estimates the KL divergence of the engine from the trainer
    (the k3 estimator). `entropy` is the mean entropy, in nats, of the distributions from which the
    trained tokens were drawn. `completions_*` and `frac_reward_zero_std` (the share of groups
    without a signal) are over everything sampled for the step; `completions_clipped_ratio` is the
    share that was truncated. `clip_ratio_low_mean` and `clip_ratio_high_mean` are the shares of
    tokens whose ratio was clipped at the lower and at the upper bound; `clip_ratio` is their sum
    (TRL's `clip_ratio/region_mean`). `reward_std` is the standard deviation over all sampled
    answers.
    """

    clip_ratio: float | None = None
    clip_ratio_low_mean: float | None = None
    clip_ratio_high_mean: float | None = None
    sampling_importance_sampling_ratio_min: float | None = None
    sampling_importance_sampling_ratio_mean: float | None = None
    sampling_importance_sampling_ratio_max: float | None = None
    sampling_logp_difference_mean: float | None = None
    sampling_logp_difference_max: float | None = None
    sampling_kl: float | None = None
    entropy: float | None = None
    completions_mean_length: float | None = None
    completions_p10_length: float | None = None
    completions_p90_length: float | None = None
    completions_max_length: float | None = None
    completions_clipped_ratio: float | None = None
    frac_reward_zero_std: float | None = None
    reward_std: float | None = None


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The result of one optimizer step.

    `skipped`: the reason why no step was made ("no-signal", "non-finite"); None: one was made.
    `quality` has further figures, see `StepQuality`.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    num_groups_local: int
    num_groups_external: int
    num_tokens: int
    skipped: str | None = None
    quality: StepQuality = field(default_factory=StepQuality)

    @property
    def external_share(self) -> float:
        """The share of peers' groups among those trained on; 0 without any."""
        num_groups = self.num_groups_local + self.num_groups_external
        return self.num_groups_external / max(1, num_groups)


def sender_and_index(group: ScoredGroup) -> tuple[str, int]:
    """Return a sort key of groups that does not depend on which peer was faster."""
    return group.peer_id or "", group.task.index


def milli_reward(means: Sequence[float]) -> int:
    """Return the reward of a peer whose groups have these mean rewards in a round.

    It is 1000 times their mean, rounded; 0 without any.
    """
    return round(1000 * sum(means) / len(means)) if means else 0


def round_seed(peer_id: str, round: int) -> int:
    """Return the seed of a peer's tasks in a round: 31 bits of sha256("PEER/ROUND").

    It depends on peer and round, so that a peer can neither choose easy tasks nor reuse groups of
    another round.
    """
    return derived_seed(f"{peer_id}/{round}")


def part_seed(peer_id: str, place: Place) -> int:
    """Return the seed for sampling answers in a part of a round; its tasks use `round_seed`."""
    seed = round_seed(peer_id, place.round)
    return derived_seed(f"{seed}/part/{place.part}") if place.part else seed


def derived_seed(text: str) -> int:
    """Return a seed of 31 bits that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
