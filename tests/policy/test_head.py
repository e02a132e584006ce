"""Log-probabilities, entropies and gradients of the output layer, against torch itself."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from worker.policy import head

torch.set_num_threads(1)


def plain(
    logits_MV: torch.Tensor, ids_M: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the same in float64, without any sharing of memory."""
    logprobs_MV = (logits_MV.double() / temperature).log_softmax(-1)
    probabilities_MV = logprobs_MV.exp()
    entropies_M = -(probabilities_MV * logprobs_MV.nan_to_num(neginf=0.0)).sum(-1)
    return logprobs_MV.gather(1, ids_M[:, None])[:, 0], entropies_M


@hypothesis_settings(max_examples=30, deadline=None, database=None)
@given(
    num_rows=st.integers(1, 7),
    num_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    scale=st.sampled_from([0.0, 1.0, 60.0]),
    seed=st.integers(0, 99),
    piece=st.sampled_from([1, 64, 1 << 19]),
)
def test_values_and_gradient_are_those_of_plain_operations(
    num_rows: int, num_tokens: int, temperature: float, scale: float, seed: int, piece: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_MV = scale * torch.randn(num_rows, num_tokens, generator=generator)
    ids_M = torch.randint(num_tokens, (num_rows,), generator=generator)
    weights_M = torch.randn(num_rows, generator=generator)
    ours = logits_MV.clone().requires_grad_()
    before, head._PIECE = head._PIECE, piece
    try:
        logprobs_M, entropies_M = head.token_logprobs(ours * 1.0, ids_M, temperature)
        (logprobs_M * weights_M).sum().backward()
    finally:
        head._PIECE = before
    theirs = logits_MV.clone().requires_grad_()
    expected_M, entropy_M = plain(theirs, ids_M, temperature)
    (expected_M * weights_M).sum().backward()
    torch.testing.assert_close(logprobs_M.double(), expected_M, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropies_M.double(), entropy_M, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_token_that_cannot_be_said_spoils_nothing() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0], [-math.inf, 5.0, -math.inf]])
    logprobs, entropies = head.token_logprobs(logits, torch.tensor([1, 1]), 1.0)
    assert logprobs.tolist() == [-math.inf, 0.0]
    assert entropies.tolist() == pytest.approx([math.log(2), 0.0])


def test_value_that_is_not_a_number_stays_one_in_its_row_only() -> None:
    logits = torch.tensor([[0.0, math.nan], [0.0, 0.0]])
    logprobs, _ = head.token_logprobs(logits, torch.tensor([0, 0]), 1.0)
    assert math.isnan(float(logprobs[0]))
    assert float(logprobs[1]) == pytest.approx(-math.log(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_not_overwritten(dtype: torch.dtype) -> None:
    values = torch.linspace(-4, 4, 12).view(2, 6).to(dtype)
    leaf, ids = values.clone().requires_grad_(), torch.tensor([3, 0])
    logprobs, entropies = head.token_logprobs(leaf, ids, 1.0)
    assert (logprobs.dtype, entropies.dtype) == (torch.float32, torch.float32)
    assert torch.equal(leaf.detach(), values)
    expected, _ = plain(values, ids, 1.0)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    logprobs.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype


def test_entropies_have_no_gradient_and_the_gradient_is_there_once() -> None:
    leaf = torch.zeros(1, 3, requires_grad=True)
    logprobs, entropies = head.token_logprobs(leaf * 1.0, torch.tensor([0]), 1.0)
    assert not entropies.requires_grad
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the gradient can be computed only once"):
        logprobs.sum().backward()


def test_no_rows_have_no_values() -> None:
    logprobs, entropies = head.token_logprobs(torch.zeros(0, 5), torch.zeros(0).long(), 1.0)
    assert (logprobs.tolist(), entropies.tolist()) == ([], [])
