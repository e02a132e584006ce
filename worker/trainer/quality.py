# ruff: noqa: N806 - tensors are named with their axes
"""Figures on the health of a training step (`records.StepQuality`)."""

# T tokens of one completion

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.records import ScoredGroup


@dataclass(frozen=True, slots=True)
class Compared:
    """A completion's log-probabilities (T,) by trainer and sampler, and its ratios in the loss."""

    trainer_logprobs: Tensor
    sampler_logprobs: Tensor
    ratios: Tensor


def of_sampling(
    compared: Sequence[Compared],
    is_by_sequence: bool,
) -> dict[str, float]:
    """Return the differences between trainer and sampler.

    With `is_by_sequence` a completion has one ratio, which counts once.
    """
    if not compared:
        return {}
    gap = torch.cat([c.trainer_logprobs - c.sampler_logprobs for c in compared])
    gap = gap[~gap.isnan()]  # tokens without a log-probability of the sampler
    ratios = torch.cat([c.ratios[:1] if is_by_sequence else c.ratios for c in compared])
    figures = {
        "sampling_importance_sampling_ratio_min": float(ratios.min()),
        "sampling_importance_sampling_ratio_mean": float(ratios.mean()),
        "sampling_importance_sampling_ratio_max": float(ratios.max()),
    }
    if gap.numel():
        figures |= {
            "sampling_logp_difference_mean": float(gap.abs().mean()),
            "sampling_logp_difference_max": float(gap.abs().max()),
            "sampling_kl": float((gap.exp() - gap - 1).mean()),
        }
    return figures


def of_completions(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Return the figures of all sampled completions and groups.

    These are lengths, truncated share, share of groups without a signal, and the unbiased standard
    deviation of all rewards.
    """
    completions = [completion for group in groups for completion in group.sampled]
    lengths = [len(completion.token_ids) for completion in completions]
    if not lengths:
        return {}
    lengths_N = torch.tensor(lengths, dtype=torch.float32)
    truncated = sum(completion.truncated for completion in completions)
    rewards_M = torch.tensor([reward for group in groups for reward in group.rewards])
    return {
        "completions_mean_length": float(lengths_N.mean()),
        "completions_p10_length": float(lengths_N.quantile(0.1)),
        "completions_p90_length": float(lengths_N.quantile(0.9)),
        "completions_max_length": float(lengths_N.max()),
        "completions_clipped_ratio": truncated / len(lengths),
        "frac_reward_zero_std": sum(not group.has_signal for group in groups) / len(groups),
        "reward_std": float(rewards_M.std()) if len(rewards_M) > 1 else 0.0,
    }
