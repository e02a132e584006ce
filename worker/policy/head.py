# ruff: noqa: N803, N806 - tensors are named with their axes
"""Compute log-probabilities, entropies and the gradient of logits in one pass, in place.

With a vocabulary of 49,000 tokens the logits are the largest tensor of a training step, and torch's
operations would read and write them ten times. Here the forward pass replaces them by their
probabilities, a few rows at a time that fit into the processor's cache, and the backward pass
replaces these by the gradient.
"""

# M tokens, V vocabulary, C tokens of a piece

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_PIECE = 1 << 19
"""Numbers to process at a time on a CPU (2 MiB in float32)."""


def token_logprobs(
    logits_MV: Tensor,
    ids_M: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities (M,) of `ids_M` at `temperature`, and the entropies (M,).

    Both are float32; the entropies have no gradient. `logits_MV` is overwritten if it is float32,
    so nothing else may use its values, not even a backward pass.
    """
    logprobs_M, entropies_M = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        logits_MV, ids_M, temperature
    )
    return logprobs_M, entropies_M


def _pieces(values_MV: Tensor, *others_M: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = values_MV.shape[0]
    if values_MV.device.type == "cpu":
        rows = max(1, _PIECE // values_MV.shape[1])
    return zip(*(torch.split(x, max(1, rows)) for x in (values_MV, *others_M)), strict=True)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_MV: Tensor, ids_M: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        values_MV = logits_MV.detach().float()
        logprobs_M = values_MV.new_empty(len(ids_M))
        entropies_M = torch.empty_like(logprobs_M)
        for piece_CV, ids_C, logprobs_C, entropies_C in _pieces(
            values_MV, ids_M, logprobs_M, entropies_M
        ):
            if temperature != 1:
                piece_CV.div_(temperature)
            piece_CV.sub_(piece_CV.amax(-1, keepdim=True))
            chosen_C = piece_CV.gather(1, ids_C[:, None])[:, 0]
            weights_CV = piece_CV.exp()
            total_C = weights_CV.sum(-1)
            # A weight of 0 must add nothing, even if its logit is -inf.
            mean_C = (piece_CV.clamp_(min=-1e30) * weights_CV).sum(-1) / total_C
            logprobs_C.copy_(chosen_C - total_C.log())
            entropies_C.copy_(total_C.log() - mean_C)
            torch.div(weights_CV, total_C[:, None], out=piece_CV)
        ctx.save_for_backward(ids_M)
        ctx.probabilities_MV, ctx.dtype, ctx.temperature = values_MV, logits_MV.dtype, temperature
        ctx.mark_non_differentiable(entropies_M)
        return logprobs_M, entropies_M

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (ids_M,) = ctx.saved_tensors
        gradient_MV, ctx.probabilities_MV = ctx.probabilities_MV, None
        if gradient_MV is None:
            raise RuntimeError("token_logprobs: the gradient can be computed only once")
        scale_M = gradients[0].float() / ctx.temperature
        for piece_CV, ids_C, scale_C in _pieces(gradient_MV, ids_M, scale_M):
            piece_CV.mul_(-scale_C[:, None])
            piece_CV.scatter_add_(1, ids_C[:, None], scale_C[:, None])
        return gradient_MV.to(ctx.dtype), None, None
