"""Completions as a training step sees them, and the choice of those that teach most."""

# T tokens of one completion

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from worker.records import ScoredGroup


@dataclass(slots=True)
class Lesson:
    """One completion to learn from.

    `is_hidden`: it is left out of the loss. `peer_id`: the peer that sampled it, None: this node.
    `weight` is the weight of each of its tokens in the loss, 0 if it is hidden. `sampler_logprobs`
    (T,) are the log-probabilities of the engine that sampled it; None: not known, as for a peer's.
    `repeated` (T,): tokens in stretches that the peer repeats (`trainer/peer_text.py`); None: not
    looked for. `old_logprobs` (T,) and `ratios`, by which the losses of tokens are multiplied, are
    None until the first pass over the batch.
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


def most_different(groups: Sequence[ScoredGroup], most: int) -> list[frozenset[int]]:
    """Return for each group the positions of the completions to learn from, `most` in total.

    If the groups have more, each keeps an equal number, at least two: half of them with its lowest
    and half with its highest rewards, which have the largest variance (PODS, arXiv 2504.13818).
    Among equal rewards the shorter completions are kept, which cost less.
    """
    if sum(len(group.rollouts) for group in groups) <= most:
        return [frozenset(range(len(group.rollouts))) for group in groups]
    return [_extremes(group, max(2, most // len(groups))) for group in groups]


def _extremes(group: ScoredGroup, count: int) -> frozenset[int]:
    positions = range(len(group.rollouts))
    if count >= len(positions):
        return frozenset(positions)

    def by_value(position: int) -> tuple[float, float]:
        rollout = group.rollouts[position]
        return rollout.reward, rollout.credit

    shortest_first = sorted(positions, key=lambda i: len(group.rollouts[i].text))
    highest = sorted(shortest_first, key=by_value, reverse=True)[: count - count // 2]
    lowest = [i for i in sorted(shortest_first, key=by_value) if i not in highest]
    return frozenset(highest + lowest[: count // 2])
