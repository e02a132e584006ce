# ruff: noqa: N803, N806 - tensors are named with their axes
"""Sample tokens with temperature, top-k, top-p, min-p and repetition penalty, as in transformers.

This is inverse transform sampling with one uniform number per row and step. Sorting or normalising
a vocabulary of 152,000 tokens takes longer than some of the model's products, so the logits are
read four times and never sorted as a whole.
"""

# R rows, V vocabulary, S tokens that a row has seen, C candidate tokens, B blocks

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from worker import settings
from worker.policy.engines import native

_LARGEST_UNIFORM = 1 - 2**-20  # keeps u * total below total in float32
_BLOCK = 512
_NUCLEUS = 128
"""Number of the most likely tokens that are tried first for top-p; it is multiplied by 16 until
their probabilities reach top-p."""


class Sampler:
    """Draws the next tokens of rows that answer `prompts` (one prompt per row)."""

    def __init__(
        self,
        generation: settings.Generation,
        prompts: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        self._generation = generation
        self._seen_RS: Tensor | None = None
        if generation.repetition_penalty != 1.0:
            # Padded with the prompt's first token: a repeated token is penalised once.
            width = max(map(len, prompts))
            self._seen_RS = torch.tensor(
                [[*p, *[p[0]] * (width - len(p))] for p in prompts], device=device
            )
        is_plain = self._seen_RS is None and generation.top_k == 0 and generation.top_p == 1
        self._functions: Any | None = native.load() if is_plain and device.type == "cpu" else None

    def keep(self, lines: Tensor) -> None:
        """Keep only these lines of the batch."""
        if self._seen_RS is not None:
            self._seen_RS = self._seen_RS[lines]

    def choose(
        self,
        logits_RV: Tensor,
        uniform_R: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return next tokens (R,), drawn with `uniform_R` in [0, 1), and log-probabilities (R,).

        The log-probabilities are at the sampling temperature, before any of the limits, as the
        trainer computes them.
        """
        logits_RV = logits_RV.float()
        if self._functions is not None:
            return self._draw(self._functions, logits_RV.contiguous(), uniform_R.contiguous())
        if self._generation.temperature != 1.0:
            logits_RV = logits_RV / self._generation.temperature
        is_plain = self._seen_RS is None
        scores_RV = logits_RV if self._seen_RS is None else self._penalise(logits_RV, self._seen_RS)
        top_R1 = scores_RV.amax(-1, keepdim=True)
        weights_RV = (scores_RV - top_R1).exp_()
        blocks = _Blocks(weights_RV)
        next_R1 = self._pick(weights_RV, blocks, uniform_R[:, None].clamp(max=_LARGEST_UNIFORM))
        # Without a penalty the blocks already have the sum.
        total_R1 = top_R1 + blocks.total_R1.log() if is_plain else _log_sum(logits_RV)
        if self._seen_RS is not None:
            self._seen_RS = torch.cat([self._seen_RS, next_R1], dim=1)
        return next_R1[:, 0], (logits_RV.gather(1, next_R1) - total_R1)[:, 0]

    def _draw(
        self,
        functions: Any,
        logits_RV: Tensor,
        uniform_R: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Draw in C, for settings that need no sorting."""
        R, V = logits_RV.shape
        tokens_R, logprobs_R = torch.empty(R, dtype=torch.long), torch.empty(R)
        sums = torch.empty(R, V // 512 + 1)
        functions.draw(
            *(t.data_ptr() for t in (logits_RV, uniform_R, tokens_R, logprobs_R, sums)),
            *(R, V, 1 / self._generation.temperature, self._generation.min_p or 0.0),
        )
        return tokens_R, logprobs_R

    def _penalise(self, scores_RV: Tensor, seen_RS: Tensor) -> Tensor:
        penalty = self._generation.repetition_penalty
        old_RS = scores_RV.gather(1, seen_RS)
        return scores_RV.scatter(
            1, seen_RS, torch.where(old_RS < 0, old_RS * penalty, old_RS / penalty)
        )

    def _pick(
        self,
        weights_RV: Tensor,
        blocks: "_Blocks",
        uniform_R1: Tensor,
    ) -> Tensor:
        generation, num_tokens = self._generation, weights_RV.shape[1]
        min_weight = generation.min_p or 0.0  # the most likely token has weight 1
        if 0 < generation.top_k < num_tokens:
            weights_RC, tokens_RC = weights_RV.topk(generation.top_k)
            total_R1 = weights_RC.sum(-1, keepdim=True)
        elif generation.top_p < 1:
            total_R1 = blocks.total_R1
            weights_RC, tokens_RC = _likeliest(weights_RV, generation.top_p * total_R1)
        else:
            if min_weight:
                blocks = _Blocks(weights_RV.masked_fill_(weights_RV < min_weight, 0.0))
            return blocks.find(uniform_R1)
        if generation.top_p < 1:
            # The candidates are in descending order: a token stays while the sum before it is less
            # than top_p. The first one always stays.
            before_RC = weights_RC.cumsum(-1) - weights_RC
            weights_RC.masked_fill_(before_RC >= generation.top_p * total_R1, 0.0)
        weights_RC.masked_fill_(weights_RC < min_weight, 0.0)
        return tokens_RC.gather(1, _search(weights_RC.cumsum(-1), uniform_R1))


class _Blocks:
    """Sums over blocks of the weights, so that a draw reads only one block."""

    def __init__(self, weights_RV: Tensor) -> None:
        self._num_tokens = weights_RV.shape[1]
        self._weights_RV = weights_RV
        if self._num_tokens <= 8 * _BLOCK:
            sums_RB = weights_RV
        else:
            whole = self._num_tokens // _BLOCK * _BLOCK
            sums_RB = weights_RV[:, :whole].view(-1, whole // _BLOCK, _BLOCK).sum(-1)
            if whole < self._num_tokens:
                sums_RB = torch.cat([sums_RB, weights_RV[:, whole:].sum(-1, keepdim=True)], dim=1)
        self._sums_RB = sums_RB
        self._cumulative_RB = sums_RB.cumsum(-1)
        self.total_R1 = self._cumulative_RB[:, -1:]

    def find(self, uniform_R1: Tensor) -> Tensor:
        """Return the tokens (R, 1) at these shares of the total weight."""
        found_R1 = _search(self._cumulative_RB, uniform_R1)
        if self._sums_RB is self._weights_RV:
            return found_R1
        sum_R1 = self._sums_RB.gather(1, found_R1)
        before_R1 = self._cumulative_RB.gather(1, found_R1) - sum_R1
        share_R1 = ((uniform_R1 * self.total_R1 - before_R1) / sum_R1).clamp(0, _LARGEST_UNIFORM)
        tokens_RB = found_R1 * _BLOCK + torch.arange(_BLOCK, device=found_R1.device)
        is_past_RB = tokens_RB >= self._num_tokens
        weights_RB = self._weights_RV.gather(
            1, tokens_RB.clamp(max=self._num_tokens - 1)
        ).masked_fill_(is_past_RB, 0.0)
        return found_R1 * _BLOCK + _search(weights_RB.cumsum(-1), share_R1)


def _log_sum(logits_RV: Tensor) -> Tensor:
    """Return the logsumexp (R, 1) of each row; takes a third of the time of torch's."""
    top_R1 = logits_RV.amax(-1, keepdim=True)
    return top_R1 + (logits_RV - top_R1).exp_().sum(-1, keepdim=True).log_()


def _search(cumulative_RC: Tensor, uniform_R1: Tensor) -> Tensor:
    """Return the index (R, 1) at which the cumulative weights exceed these shares of their total.

    The weight at the index is never 0.
    """
    found_R1 = torch.searchsorted(cumulative_RC, uniform_R1 * cumulative_RC[:, -1:], right=True)
    return found_R1.clamp_(max=cumulative_RC.shape[1] - 1)


def _likeliest(
    weights_RV: Tensor,
    wanted_R1: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the largest weights and their tokens (R, C), descending; a row sums to `wanted_R1`."""
    count = _NUCLEUS
    while count < weights_RV.shape[1] // 4:
        weights_RC, tokens_RC = weights_RV.topk(count)
        if bool((weights_RC.sum(-1, keepdim=True) >= wanted_R1).all()):
            return weights_RC, tokens_RC
        count *= 16
    return weights_RV.sort(descending=True)
