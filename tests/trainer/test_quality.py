"""Figures on the health of a training step, against values computed by hand."""

import math

import pytest
import torch

from worker.records import Completion, Rollout, ScoredGroup, StepQuality, Task
from worker.trainer import quality
from worker.trainer.quality import Compared

TASK = Task("gcd", "0" * 12, 1, 0)


def compared(trainer: list[float], sampler: list[float], ratios: list[float]) -> Compared:
    return Compared(torch.tensor(trainer), torch.tensor(sampler), torch.tensor(ratios))


def group(*answers: tuple[int, bool, float]) -> ScoredGroup:
    """Return a group of our own answers: tokens, whether truncated, reward."""
    rollouts = [
        Rollout("x", reward, Completion("x", (1,) * tokens, (), truncated))
        for tokens, truncated, reward in answers
    ]
    return ScoredGroup(TASK, "?", tuple(rollouts))


def test_differences_between_trainer_and_sampler() -> None:
    figures = quality.of_sampling(
        [
            compared([-1.0, -2.0], [-1.0, -2.5], [1.0, 1.5]),
            compared([-3.0], [-2.0], [0.25]),
        ],
        is_by_sequence=False,
    )
    assert figures["sampling_logp_difference_mean"] == pytest.approx((0 + 0.5 + 1) / 3)
    assert figures["sampling_logp_difference_max"] == pytest.approx(1)
    k3 = [math.exp(gap) - gap - 1 for gap in (0.0, 0.5, -1.0)]
    assert figures["sampling_kl"] == pytest.approx(sum(k3) / 3)
    assert [
        figures[f"sampling_importance_sampling_ratio_{name}"] for name in ("min", "mean", "max")
    ] == pytest.approx([0.25, 2.75 / 3, 1.5])


def test_ratio_of_a_sequence_counts_once() -> None:
    long = compared([0.0] * 9, [0.0] * 9, [3.0] * 9)
    short = compared([0.0], [0.0], [1.0])
    mean = "sampling_importance_sampling_ratio_mean"
    assert quality.of_sampling([long, short], is_by_sequence=True)[mean] == pytest.approx(2)
    assert quality.of_sampling([long, short], is_by_sequence=False)[mean] == pytest.approx(2.8)


def test_tokens_without_a_log_probability_of_the_sampler_are_left_out() -> None:
    figures = quality.of_sampling([compared([-1.0, -9.0], [-2.0, math.nan], [1.0, 1.0])], False)
    assert figures["sampling_logp_difference_max"] == pytest.approx(1)
    without = quality.of_sampling([compared([-1.0], [math.nan], [1.0])], False)
    assert "sampling_kl" not in without
    assert quality.of_sampling([], False) == {}


def test_lengths_and_shares_of_all_completions() -> None:
    figures = quality.of_completions(
        [
            group((10, False, 1.0), (20, True, 0.0)),
            group((30, False, 0.5), (40, False, 0.5)),
        ]
    )
    assert figures["completions_mean_length"] == 25
    assert figures["completions_max_length"] == 40
    assert figures["completions_p10_length"] == pytest.approx(13)
    assert figures["completions_p90_length"] == pytest.approx(37)
    assert figures["completions_clipped_ratio"] == 0.25
    assert figures["frac_reward_zero_std"] == 0.5
    assert figures["reward_std"] == pytest.approx(math.sqrt(0.5 / 3))


def test_groups_without_our_own_completions_have_no_figures() -> None:
    assert quality.of_completions([]) == {}
    of_a_peer = ScoredGroup(TASK, "?", (Rollout("x", 1.0), Rollout("y", 0.0)), "peer")
    assert quality.of_completions([of_a_peer]) == {}


def test_every_figure_is_a_field_of_the_record() -> None:
    figures = quality.of_sampling([compared([-1.0], [-2.0], [1.0])], False)
    figures |= quality.of_completions([group((1, False, 1.0), (2, False, 0.0))])
    StepQuality(**figures)
