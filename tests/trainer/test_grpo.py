import math
import statistics
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from worker import settings
from worker.trainer.grpo import (
    group_advantages,
    sampling_ratios,
    sequence_weights,
    token_losses,
)


def test_advantages_are_the_hand_computed_ones():
    # mean 0.5, unbiased variance (4 x 0.25) / 3
    std = math.sqrt(1 / 3)
    assert group_advantages([1, 0, 1, 0], "group") == pytest.approx(
        [0.5 / (std + 1e-4), -0.5 / (std + 1e-4)] * 2, rel=1e-6
    )
    assert group_advantages([1, 0, 1, 0], "none") == [0.5, -0.5, 0.5, -0.5]
    assert group_advantages([0.3, 0.3], "group") == [0.0, 0.0]


def test_floored_advantages_of_small_differences_are_small():
    std = math.sqrt(1 / 8)  # of one right answer in eight, above the floor of 0.2
    right = group_advantages([1] + [0] * 7, "floored")
    assert right == pytest.approx([0.875 / std] + [-0.125 / std] * 7, rel=1e-5)
    assert group_advantages([0.05, 0.01], "floored") == pytest.approx([0.1, -0.1], rel=1e-5)
    assert group_advantages([0.3, 0.3], "floored") == [0.0, 0.0]


WEIGHTS = {
    "grpo": [1 / 6, 1 / 3, 0.0],
    "bnpo": [1 / 3] * 3,
    "dapo": [1 / 3] * 3,
    "dr_grpo": [1 / 30] * 3,
}


def test_every_loss_of_the_settings_is_computed_by_hand():
    assert set(get_args(settings.Trainer.model_fields["loss_type"].annotation)) == {*WEIGHTS}


@pytest.mark.parametrize(("loss_type", "weights"), WEIGHTS.items())
def test_weights_of_two_sequences_and_a_masked_one(loss_type, weights):
    assert sequence_weights([2, 1, 0], loss_type, max_completion_length=10) == pytest.approx(
        weights
    )


def test_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="loss_type: 'unknown'"):
        sequence_weights([1], "unknown", 10)


def losses(ratio, advantage, **options):
    logprob = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, clipped = token_losses(
        logprob, torch.zeros(1), torch.tensor([advantage]), settings.Trainer(**options)
    )
    loss.sum().backward()
    return loss.item(), logprob.grad.item(), bool(clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 1.0, -1.0, -1.0, False),
        (1.0, -1.0, 1.0, 1.0, False),
        (1.27, 1.0, -1.27, -1.27, False),  # within 0.28 above
        (1.5, 1.0, -1.28, 0.0, True),
        (1.5, -1.0, 1.5, 1.5, False),  # a bad token that became likelier is always pushed down
        (0.5, 1.0, -0.5, -0.5, False),
        (0.5, -1.0, 0.8, 0.0, True),
    ],
)
def test_clipped_loss_is_the_hand_computed_one(ratio, advantage, loss, gradient, clipped):
    observed = losses(ratio, advantage)
    assert observed[:2] == pytest.approx((loss, gradient), rel=1e-6)
    assert observed[2] is clipped


def test_epsilon_high_of_none_is_epsilon():
    assert losses(1.5, 1.0, epsilon_high=None)[0] == pytest.approx(-1.2)


def test_kl_term_is_the_hand_computed_one():
    logprobs, reference = torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.5])
    loss, _ = token_losses(
        logprobs, logprobs.detach(), torch.tensor([0.0]), settings.Trainer(beta=0.1), reference
    )
    assert loss.item() == pytest.approx(0.1 * (math.exp(-0.5) + 0.5 - 1), rel=1e-5)
    loss.backward()
    # ratio x (exp(gap) - gap - 1): the ratio's gradient cancels exp(gap) - 1 and leaves -gap.
    assert logprobs.grad.item() == pytest.approx(0.1 * 0.5, rel=1e-5)


# The same arithmetic, naively, in Python's own floating point numbers.

MODES = [
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "token_truncate_sequence_mask",
]
NUMBERS = st.floats(-6.0, 0.0, width=32)


def naive_ratio(gaps: Sequence[float], position: int, **bounds: Any) -> float:
    """Return the importance ratio of one token of a sequence with these gaps."""
    mode, low, high = bounds["mode"], bounds["low"], bounds["high"]
    whole, own = math.exp(sum(gaps)), math.exp(gaps[position])
    if mode == "token_truncate_sequence_mask":
        is_outside = (low is not None and whole < low) or (high is not None and whole > high)
        return 0.0 if is_outside else min(max(own, low or 0.0), high or math.inf)
    ratio = whole if mode.startswith("sequence") else own
    if mode.endswith("truncate"):
        return min(max(ratio, low or 0.0), high or math.inf)
    is_outside = (low is not None and ratio < low) or (high is not None and ratio > high)
    return 0.0 if is_outside else ratio


def naive_loss(
    logprob: float, old: float, advantage: float, trainer: settings.Trainer, reference: float
) -> float:
    high = trainer.epsilon_high or trainer.epsilon
    ratio = math.exp(logprob - old)
    clipped = min(max(ratio, 1 - trainer.epsilon), 1 + high)
    gap = reference - logprob
    kl = ratio * (math.exp(gap) - gap - 1)
    return -min(ratio * advantage, clipped * advantage) + trainer.beta * kl


@hypothesis_settings(max_examples=50, deadline=None, database=None)
@given(
    rewards=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=9),
    scale=st.sampled_from(["group", "floored", "none"]),
)
def test_advantages_are_those_of_a_naive_computation(rewards: list[float], scale: str) -> None:
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    divisor = {"group": std + 1e-4, "floored": max(std, 0.2), "none": 1.0}[scale]
    expected = [(reward - mean) / divisor for reward in rewards]
    # float32 of the rewards' mean, divided by as little as 1e-4
    assert group_advantages(rewards, scale) == pytest.approx(expected, rel=1e-3, abs=2e-3)


@pytest.mark.parametrize("scale", ["group", "floored", "none"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
def test_equal_rewards_have_no_advantage(scale: str, reward: float) -> None:
    assert group_advantages([reward] * 4, scale) == [0.0] * 4


@hypothesis_settings(max_examples=40, deadline=None, database=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    loss_type=st.sampled_from(["grpo", "bnpo", "dapo", "dr_grpo"]),
)
def test_weights_add_up_to_the_average_that_the_loss_names(
    lengths: list[int], loss_type: str
) -> None:
    """A loss of 1 for every token gives the share of the average that is not masked."""
    weights = sequence_weights(lengths, loss_type, 16)
    total = sum(weight * length for weight, length in zip(weights, lengths, strict=True))
    expected = {
        "grpo": sum(length > 0 for length in lengths) / len(lengths),
        "bnpo": 1.0 if any(lengths) else 0.0,
        "dapo": 1.0 if any(lengths) else 0.0,
        "dr_grpo": sum(lengths) / (16 * len(lengths)),
    }[loss_type]
    assert total == pytest.approx(expected)


@hypothesis_settings(max_examples=80, deadline=None, database=None)
@given(
    sequences=st.lists(
        st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=5), min_size=1, max_size=3
    ),
    mode=st.sampled_from(MODES),
    bounds=st.sampled_from([(None, 3.0), (0.5, 3.0), (0.5, None), (0.0, 1.0)]),
)
def test_ratios_are_those_of_a_naive_computation(
    sequences: list[list[tuple[float, float]]],
    mode: str,
    bounds: tuple[float | None, float | None],
) -> None:
    low, high = bounds
    trainer = settings.Trainer(
        importance_sampling_mode=mode,  # type: ignore[arg-type]
        importance_sampling_clip_min=low,
        importance_sampling_clip_max=high,
    )
    old = [torch.tensor([pair[0] for pair in pairs]) for pairs in sequences]
    sampler = [torch.tensor([pair[1] for pair in pairs]) for pairs in sequences]
    found = sampling_ratios(old, sampler, trainer)
    for pairs, ratios in zip(sequences, found, strict=True):
        gaps = [a - b for a, b in pairs]
        for position, ratio in enumerate(ratios.tolist()):
            judged = math.exp(sum(gaps)) if "sequence" in mode else math.exp(gaps[position])
            if any(bound is not None and abs(judged - bound) < 1e-4 for bound in bounds):
                continue  # either side of a bound is right
            expected = naive_ratio(gaps, position, mode=mode, low=low, high=high)
            assert ratio == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_sampler_without_log_probabilities_changes_nothing(mode: str) -> None:
    old = [torch.tensor([-1.0, -2.0]), torch.tensor([-9.0])]
    options = {"importance_sampling_mode": mode, "importance_sampling_clip_min": 0.1}
    unknown = sampling_ratios(old, [None, torch.tensor([math.nan])], settings.Trainer(**options))
    assert [ratios.tolist() for ratios in unknown] == [[1.0, 1.0], [1.0]]
    off = settings.Trainer(importance_sampling_correction=False, **options)
    far = sampling_ratios(old, [torch.zeros(2), torch.zeros(1)], off)
    assert [ratios.tolist() for ratios in far] == [[1.0, 1.0], [1.0]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_hopeless_sequence_has_finite_ratios(mode: str, gap: float) -> None:
    trainer = settings.Trainer(importance_sampling_mode=mode)  # type: ignore[arg-type]
    (ratios,) = sampling_ratios([torch.tensor([gap, 0.0])], [torch.zeros(2)], trainer)
    assert torch.isfinite(ratios).all()
    assert 0 <= float(ratios.min()) <= float(ratios.max()) <= 3


@hypothesis_settings(max_examples=60, deadline=None, database=None)
@given(
    tokens=st.lists(
        st.tuples(NUMBERS, NUMBERS, st.floats(-3, 3, width=32), NUMBERS, st.floats(0, 2, width=32)),
        min_size=1,
        max_size=6,
    ),
    beta=st.sampled_from([0.0, 0.04]),
    epsilon_high=st.sampled_from([None, 0.28]),
)
def test_losses_are_those_of_a_naive_computation(
    tokens: list[tuple[float, ...]], beta: float, epsilon_high: float | None
) -> None:
    trainer = settings.Trainer(beta=beta, epsilon_high=epsilon_high)
    logprobs, old, advantages, reference, weights = (
        torch.tensor(c) for c in zip(*tokens, strict=True)
    )
    found, clipped = token_losses(logprobs, old, advantages, trainer, reference)
    expected = [naive_loss(*values[:3], trainer, values[3]) for values in tokens]
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    # A clipped token has no gradient from its advantage, every other has.
    plain = settings.Trainer(epsilon_high=epsilon_high)
    leaf = logprobs.clone().requires_grad_()
    token_losses(leaf, old, advantages, plain)[0].sum().backward()
    assert leaf.grad is not None
    moves = (advantages * torch.exp(logprobs - old)).abs() > 1e-6
    assert torch.equal((leaf.grad == 0)[moves], clipped[moves])
    weighted, _ = token_losses(logprobs, old, advantages, plain, sampling_ratios_M=weights)
    unweighted, _ = token_losses(logprobs, old, advantages, plain)
    assert torch.allclose(weighted, unweighted * weights)
