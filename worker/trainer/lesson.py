"""Completions as a training step sees them, and the choice of those that teach most."""

# T tokens of one completion

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from worker.records import ScoredGroup

LEAST_OF_GROUP = 2
"""Smallest number of completions that each group of a large batch keeps, if it has that many."""


@dataclass(slots=True)
class Lesson:
    """One completion to learn from.

    `is_hidden`: it is left out of the loss. `peer_id`: the peer that sampled it, None: this node.
    `weight` is the weight of each of its tokens in the loss, 0 if it is hidden. `sampler_logprobs`
    (T,) are the log-probabilities of the engine that sampled it; None: unknown, as for a peer's.
    `repeated` (T,): whether each token is part of a stretch that the peer repeats
    (`trainer/peer_text.py`); None: not determined. `old_logprobs` (T,) and `ratios`, by which the
    losses of tokens are multiplied, are None until the first pass over the batch.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    advantage: float
    is_hidden: bool
    peer_id: str | None = None
    weight: float = 0.0
    sampler_logprobs: Tensor | None = None
    repeated: Tensor | None = None
    old_logprobs: Tensor | None = None
    ratios: Tensor | None = None


def most_different(
    groups: Sequence[ScoredGroup], usable: Sequence[Collection[int]], most: int
) -> list[frozenset[int]]:
    """Return for each group the positions of the completions to learn from.

    There are at most `most` in total, unless LEAST_OF_GROUP of each group are more.

    `usable` are the positions of each group that are not left out of the loss for another reason.
    If there are more than `most`, each group keeps at most an equal number, at least two: half of
    them with its lowest and half with its highest rewards, which have the largest variance (PODS,
    arXiv 2504.13818). Among equal rewards the shorter completions are kept, which cost less.
    """
    share = max(map(len, usable), default=0)
    while share > LEAST_OF_GROUP and sum(min(share, len(each)) for each in usable) > most:
        share -= 1
    return [_extremes(*pair, share) for pair in zip(groups, usable, strict=True)]


def _extremes(group: ScoredGroup, usable: Collection[int], count: int) -> frozenset[int]:
    if count >= len(usable):
        return frozenset(usable)

    def by_value(position: int) -> tuple[float, float]:
        rollout = group.rollouts[position]
        return rollout.reward, rollout.credit

    shortest_first = sorted(usable, key=lambda i: len(group.rollouts[i].text))
    highest = sorted(shortest_first, key=by_value, reverse=True)[: count - count // 2]
    lowest = [i for i in sorted(shortest_first, key=by_value) if i not in highest]
    return frozenset(highest + lowest[: count // 2])
