import pytest
import torch
from torch.nn import functional

from worker.policy import prompt_attention

torch.set_num_threads(1)


def make(dtype, rows=3, length=7, prompt=11, heads=6, key_heads=2):
    torch.manual_seed(0)
    shapes = [
        (rows, length, heads, 16),
        (rows, length, key_heads, 16),
        (rows, length, key_heads, 16),
        (prompt, key_heads, 16),
        (prompt, key_heads, 16),
    ]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def plain(q, k, v, prompt_k, prompt_v, mask, scale):
    """The same from torch's own operations, keys copied for every row and head."""
    repeats = q.shape[2] // k.shape[2]
    keys, values = (
        torch.cat([p.expand(len(own), -1, -1, -1), own], 1).repeat_interleave(repeats, 2)
        for p, own in ((prompt_k, k), (prompt_v, v))
    )
    scores = torch.einsum("cthd,cshd->chts", q, keys) * scale
    weights = functional.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    return torch.einsum("chts,cshd->cthd", weights, values)


def look_back(length, prompt, window=None):
    query, other = torch.arange(prompt, prompt + length)[:, None], torch.arange(prompt + length)
    mask = other <= query
    return mask if window is None else mask & (query - other < window)


def result_and_gradients(attend, inputs, mask):
    out = attend(*inputs, mask, 0.3)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("window", [None, 4, 9])
def test_result_and_gradients_are_those_of_plain_attention(window):
    mask = look_back(7, 11, window)
    ours = result_and_gradients(prompt_attention.attend, make(torch.float32), mask)
    expected = result_and_gradients(plain, make(torch.float32), mask)
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_bfloat16_is_as_exact_as_torchs_own_backward_pass():
    def fused(q, k, v, prompt_k, prompt_v, mask, scale):
        repeats = q.shape[2] // k.shape[2]
        keys, values = (
            torch.cat([p.expand(len(own), -1, -1, -1), own], 1).repeat_interleave(repeats, 2)
            for p, own in ((prompt_k, k), (prompt_v, v))
        )
        return functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, keys, values)), attn_mask=mask, scale=scale
        ).transpose(1, 2)

    mask, inputs = look_back(7, 11), make(torch.bfloat16)
    exact = result_and_gradients(plain, [x.detach().float().requires_grad_() for x in inputs], mask)
    ours = result_and_gradients(prompt_attention.attend, inputs, mask)
    theirs = result_and_gradients(fused, inputs, mask)
    for found, reference, wanted in zip(ours, theirs, exact, strict=True):
        assert found.dtype == torch.bfloat16
        error, allowed = ((x.float() - wanted).norm() / wanted.norm() for x in (found, reference))
        assert error < 1.5 * allowed


def test_products_are_as_exact_as_before_for_others():
    precision = torch.backends.mkldnn.matmul.fp32_precision
    result_and_gradients(prompt_attention.attend, make(torch.bfloat16), look_back(7, 11))
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
