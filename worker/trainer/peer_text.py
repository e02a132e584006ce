# ruff: noqa: N803, N806 - tensors are named with their axes
"""Weigh the tokens of peers' completions by what this node's own policy could have said.

A reward says nothing about the text around the answer, so a peer can send right answers with
planted text, which honest nodes would learn (arXiv 2511.09780). Two rules, which need no judge and
nothing that the peer says about itself, take the effect from it:

* An improbable token counts little (`token_weights`).
* A stretch that a peer repeats in its answers to different tasks, and that this node never says,
  does not count at all (`repeated_stretches`). The rest of such an answer is learned from, so a
  peer with a style of its own, such as a better model, is still useful.
"""

# T tokens of one completion

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

STRETCH = 6
"""Tokens of a stretch; longer than an answer's tags, which all peers repeat."""
MIN_TASKS = 3
"""A stretch counts as repeated from this many tasks on; in smaller samples chance repeats, too."""
MIN_SHARE = 0.5
"""Share of a peer's tasks in whose answers a repeated stretch occurs."""

PLANTED_LOGPROB = -3.0
"""Mean log-probability of a token of repeated text below which it counts as planted, in nats.

A peer's habit that our policy finds natural, such as "Let us solve this step by step", is above.
"""

Ids = tuple[int, ...]


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


def stretches(ids: Sequence[int]) -> Iterator[Ids]:
    """Yield every run of STRETCH tokens."""
    return (tuple(ids[i : i + STRETCH]) for i in range(len(ids) - STRETCH + 1))


def stretches_of(texts: Iterable[Sequence[int]]) -> set[Ids]:
    """Return all stretches of several texts."""
    return {stretch for ids in texts for stretch in stretches(ids)}


def repeated_stretches(tasks: Sequence[Sequence[Sequence[int]]], said: set[Ids]) -> set[Ids]:
    """Return the stretches that one peer repeats across tasks and that are not in `said`.

    `tasks` has the token ids of the peer's answers to each task; `said` are the stretches of this
    node's own answers and prompts.
    """
    if len(tasks) < MIN_TASKS:
        return set()
    counts: Counter[Ids] = Counter()
    for answers in tasks:
        counts.update(stretches_of(answers))
    least = max(MIN_TASKS, MIN_SHARE * len(tasks))
    return {s for s, count in counts.items() if count >= least and s not in said}


def is_repeated(ids: Sequence[int], repeated: set[Ids]) -> Tensor:
    """Return whether each token (T,) of a completion is part of a repeated stretch."""
    found_T = torch.zeros(len(ids), dtype=torch.bool)
    for start, stretch in enumerate(stretches(ids)):
        if stretch in repeated:
            found_T[start : start + STRETCH] = True
    return found_T


def is_planted(logprobs_T: Tensor | None, repeated_T: Tensor | None) -> bool:
    """Return whether a completion has repeated text that this node's policy would not say.

    `logprobs_T` are its tokens' log-probabilities under this policy; None: they were not computed.
    """
    if logprobs_T is None or repeated_T is None or not repeated_T.any():
        return False
    return bool(logprobs_T[repeated_T.to(logprobs_T.device)].mean() < PLANTED_LOGPROB)
