import math

import pytest
import torch

from worker import settings
from worker.trainer.grpo import group_advantages, sequence_weights, token_losses


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


@pytest.mark.parametrize(
    ("loss_type", "weights"),
    [
        ("grpo", [1 / 6, 1 / 3, 0.0]),
        ("bnpo", [1 / 3] * 3),
        ("dapo", [1 / 3] * 3),
        ("dr_grpo", [1 / 30] * 3),
    ],
)
def test_weights_of_two_sequences_and_a_masked_one(loss_type, weights):
    assert sequence_weights([2, 1, 0], loss_type, max_completion_length=10) == pytest.approx(
        weights
    )


def test_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="loss_type: 'sapo'"):
        sequence_weights([1], "sapo", 10)


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
