# ruff: noqa: N803, N806 - tensors are named with their axes
"""Weigh the tokens of peers' completions by their probability under this node's own policy.

A reward says nothing about the text around the answer, so a peer can send right answers with
planted text, which honest nodes would learn (arXiv 2511.09780). Two rules prevent that; they need
neither a judge model nor any statement of the peer:

* An improbable token has a small weight (`token_weights`).
* A stretch (STRETCH successive tokens) that a peer repeats in its answers to different tasks, and
  that this node hardly ever generates, has no weight (`PeerTexts`). The rest of such an answer is
  learned from, so a peer with a style of its own, such as a better model, is still useful.
"""

# T tokens of one completion

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from cachetools import FIFOCache, LRUCache
from torch import Tensor

from worker.records import Task

STRETCH = 6
"""Number of tokens of a stretch: more than an answer's tags have, which all peers repeat."""
MIN_TASKS = 5
"""Smallest number of a peer's tasks in whose answers a repeated stretch occurs.

With 3, the nonsense of an untrained model was mistaken for planted text in 1 of 300 groups.
"""
MIN_SHARE = 0.2
"""Smallest share of a peer's tasks in whose answers a repeated stretch occurs."""
TASKS_KEPT = 48
"""Number of tasks of each peer to remember, the latest ones: those of several steps."""
PEERS_KEPT = 64
"""Number of peers to remember, the latest ones. With long answers they take 50 MB in total."""
MIN_OWN_ANSWERS = 2
"""Smallest number of our answers that contain a stretch that this node generates itself."""
MIN_OWN_SHARE = 0.05
"""Smallest share of our answers that contain such a stretch."""
OWN_ANSWERS_KEPT = 768
"""Number of our own answers to remember: more than TASKS_KEPT tasks usually have."""

PLANTED_LOGPROB = -3.0
"""Repeated text counts as planted if the mean log-probability of its tokens is lower, in nats.

A peer's phrase that our policy finds natural, such as "Let us solve this step by step", has more.
"""

_POWERS = torch.tensor([pow(1_000_003, i, 1 << 63) for i in range(STRETCH)])


def token_weights(
    logprobs_T: Tensor, min_probability: float, repeated_T: Tensor | None = None
) -> Tensor:
    """Return the weight (T,) of each token in the loss: min(1, p / min_probability).

    p is the token's probability under this node's policy before the step. This is the ratio of
    truncated importance sampling (F-TIS, arXiv 2605.22537) with a constant in the place of the
    sender's probability, which can't be trusted. With a `min_probability` of 0 it is 1. Tokens in
    `repeated_T` have the weight 0.
    """
    weights_T = torch.ones_like(logprobs_T)
    if min_probability:
        weights_T = (logprobs_T.exp() / min_probability).clamp(max=1.0)
    if repeated_T is not None:
        weights_T = weights_T.masked_fill(repeated_T.to(weights_T.device), 0.0)
    return weights_T


def stretches(ids: Sequence[int]) -> Tensor:
    """Return a hash of every run of STRETCH tokens, in their order."""
    if len(ids) < STRETCH:
        return torch.empty(0, dtype=torch.int64)
    return (torch.tensor(ids).unfold(0, STRETCH, 1) * _POWERS).sum(1)


def is_repeated(ids: Sequence[int], repeated: Tensor) -> Tensor:
    """Return whether each token (T,) of a completion is part of a repeated stretch."""
    found_T = torch.zeros(len(ids), dtype=torch.bool)
    for start in torch.isin(stretches(ids), repeated).nonzero().flatten().tolist():
        found_T[start : start + STRETCH] = True
    return found_T


@dataclass(slots=True)
class _Sender:
    """The stretches of a peer's answers to its last tasks, by task.

    `has_planted`: whether its groups in the last step that had any contained planted text.
    """

    tasks: FIFOCache[Task, Tensor] = field(default_factory=lambda: FIFOCache(TASKS_KEPT))
    has_planted: bool = False


class PeerTexts:
    """The stretches in the last answers of peers and of this node.

    They are kept over several steps, because a step has only a few groups of a peer. They are in
    memory only.
    """

    def __init__(self) -> None:
        self._senders: LRUCache[str, _Sender] = LRUCache(PEERS_KEPT)
        self._own: deque[Tensor] = deque(maxlen=OWN_ANSWERS_KEPT)

    def see_own(self, answers: Iterable[Sequence[int]]) -> None:
        """Remember answers of this node, as token ids."""
        self._own.extend(_count(stretches(ids))[0] for ids in answers)

    def see(
        self, peer_id: str, task: Task, prompt: Sequence[int], answers: Iterable[Sequence[int]]
    ) -> None:
        """Remember a peer's answers to a task. A stretch of the prompt is never counted."""
        said = _count(torch.cat([stretches(()), *map(stretches, answers)]))[0]
        sender = self._senders.setdefault(peer_id, _Sender())
        sender.tasks[task] = said[~torch.isin(said, stretches(prompt))]

    def said(self) -> Tensor:
        """Return the stretches that this node generates itself, in more than single answers.

        If one answer were enough, a policy that has begun to learn planted text would switch the
        rule off.
        """
        least = max(MIN_OWN_ANSWERS, MIN_OWN_SHARE * len(self._own))
        return _frequent(self._own, least)

    def repeated(self, peer_id: str, said: Tensor) -> Tensor:
        """Return the stretches that a peer repeats across tasks and that are not in `said`."""
        sender = self._senders.get(peer_id)
        if sender is None or len(sender.tasks) < MIN_TASKS:
            return stretches(())
        least = max(MIN_TASKS, MIN_SHARE * len(sender.tasks))
        found = _frequent(sender.tasks.values(), least)
        return found[~torch.isin(found, said)]

    def note(self, peer_id: str, has_planted: bool) -> None:
        """Remember whether a peer's groups of the last step had planted text."""
        if (sender := self._senders.get(peer_id)) is not None:
            sender.has_planted = has_planted

    def has_planted(self, peer_id: str) -> bool:
        sender = self._senders.get(peer_id)
        return sender is not None and sender.has_planted


def _frequent(sets: Iterable[Tensor], least: float) -> Tensor:
    """Return the stretches that occur in at least `least` of the sets."""
    found, counts = _count(torch.cat([stretches(()), *sets]))
    return found[counts >= least]


def _count(hashes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the different values, and how often each of them occurs."""
    found, counts = torch.unique(hashes, return_counts=True)
    return found, counts


def is_planted(logprobs_T: Tensor | None, repeated_T: Tensor | None) -> bool:
    """Return whether a completion has repeated text that is improbable under this node's policy.

    `logprobs_T` are its tokens' log-probabilities under this policy; None: they were not computed.
    """
    if logprobs_T is None or repeated_T is None or not repeated_T.any():
        return False
    return bool(logprobs_T[repeated_T.to(logprobs_T.device)].mean() < PLANTED_LOGPROB)
