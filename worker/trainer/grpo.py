# ruff: noqa: N803, N806 - tensors are named with their axes
"""The arithmetic of GRPO as pure functions: advantages within a group and the clipped loss.

The definitions are TRL's, and a test compares them. Not implemented: entropy bonus, sequence-level
ratios, and loss types that the settings do not name.
"""

# M completion tokens, one completion after the other

from collections.abc import Sequence

import torch
from torch import Tensor

from worker import settings
from worker.records import REWARD_STD_FLOOR

STD_EPSILON = 1e-4  # as in TRL


def group_advantages(
    rewards: Sequence[float],
    scale_rewards: str,
) -> list[float]:
    """Return the rewards of a group minus their mean.

    With `scale_rewards` "group" they are also divided by their unbiased standard deviation, and
    with "floored" by that or REWARD_STD_FLOOR, whichever is larger.
    """
    reward_tensor = torch.tensor(rewards, dtype=torch.float32)
    advantages = reward_tensor - reward_tensor.mean()
    match scale_rewards:
        case "group":
            advantages = advantages / (reward_tensor.std() + STD_EPSILON)
        case "floored":
            advantages = advantages / reward_tensor.std().clamp(min=REWARD_STD_FLOOR)
    return [float(a) for a in advantages]


def sequence_weights(
    lengths: Sequence[int], loss_type: str, max_completion_length: int
) -> list[float]:
    """Return the weight of each sequence's tokens in the loss, which is then a weighted sum.

    The weights do not depend on the forward pass, so the sum can be split into micro-batches.
    `lengths` are the counted tokens of each sequence; 0 for a masked one, which still counts as a
    sequence.
    """
    match loss_type:
        case "grpo":
            return [1 / (len(lengths) * length) if length else 0.0 for length in lengths]
        case "bnpo" | "dapo":  # the same if a step sees its whole batch, as ours does
            return [1 / max(1, sum(lengths))] * len(lengths)
        case "dr_grpo":
            return [1 / (len(lengths) * max_completion_length)] * len(lengths)
        case _:
            raise ValueError(f"loss_type: {loss_type!r}")


def sampling_ratios(
    old_logprobs: Sequence[Tensor],
    sampler_logprobs: Sequence[Tensor | None],
    trainer: settings.Trainer,
) -> list[Tensor]:
    """Return importance ratios between trainer and sampler, which multiply the policy loss.

    Each sequence has ratios (T,) within the bounds in `trainer`. They are 1 where the sampler's
    log-probabilities are unknown: for a whole sequence (None) or a token (NaN).
    """
    ratios = []
    for old_T, sampler_T in zip(old_logprobs, sampler_logprobs, strict=True):
        if sampler_T is None or not trainer.importance_sampling_correction:
            ratios.append(torch.ones_like(old_T))
            continue
        gap_T = torch.nan_to_num(old_T - sampler_T, nan=0.0)
        ratios.append(_bounded_ratio(gap_T, trainer))
    return ratios


def _bounded_ratio(gap_T: Tensor, trainer: settings.Trainer) -> Tensor:
    mode = trainer.importance_sampling_mode
    low, high = trainer.importance_sampling_clip_min, trainer.importance_sampling_clip_max
    whole_T = gap_T.sum().exp().expand_as(gap_T)
    ratio_T = whole_T if mode.startswith("sequence") else gap_T.exp()
    judged_T = whole_T if mode.endswith("sequence_mask") else ratio_T
    if "truncate" in mode:
        ratio_T = ratio_T.clamp(low, high)
    if mode.endswith("mask"):
        is_outside_T = torch.zeros_like(judged_T, dtype=torch.bool)
        if low is not None:
            is_outside_T |= judged_T < low
        if high is not None:
            is_outside_T |= judged_T > high
        ratio_T = ratio_T.masked_fill(is_outside_T, 0.0)
    return ratio_T


def token_losses(
    logprobs_M: Tensor,
    old_logprobs_M: Tensor,
    advantages_M: Tensor,
    trainer: settings.Trainer,
    reference_logprobs_M: Tensor | None = None,
    sampling_ratios_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the clipped policy loss (M,) of each token, and whether it was clipped (M,).

    A token has its sequence's advantage. `sampling_ratios_M` is the result of `sampling_ratios`;
    None: 1. `reference_logprobs_M` is required, and used, if `trainer.beta` is not 0.
    """
    high = trainer.epsilon if trainer.epsilon_high is None else trainer.epsilon_high
    ratio_M = torch.exp(logprobs_M - old_logprobs_M)
    clipped_M = ratio_M.clamp(1 - trainer.epsilon, 1 + high)
    loss_M = -torch.min(ratio_M * advantages_M, clipped_M * advantages_M)
    if sampling_ratios_M is not None:
        loss_M = loss_M * sampling_ratios_M
    if trainer.beta and reference_logprobs_M is not None:
        gap_M = reference_logprobs_M - logprobs_M
        # The tokens were drawn from the old policy; the ratio corrects the gradient to that of the
        # KL (arXiv 2512.02556; TRL's use_bias_correction_kl, its default).
        loss_M = loss_M + trainer.beta * ratio_M * (torch.exp(gap_M) - gap_M - 1)
    too_low_M = (ratio_M < 1 - trainer.epsilon) & (advantages_M < 0)
    too_high_M = (ratio_M > 1 + high) & (advantages_M > 0)
    return loss_M, too_low_M | too_high_M
