# ruff: noqa: N803, N806, N815 - tensors are named with their axes
"""Attention of a prompt's completions, with a backward pass of matrix products for CPUs.

The forward pass is torch's fused kernel. The kernel's own backward pass takes four times as long on
a CPU, because it processes one row and head at a time, with a copy of the prompt's keys for each
row. Here the prompt's keys are one factor of a single product for all rows and for all heads that
share them. The gradients are those of FlashAttention-2 (arXiv 2307.08691, section 2.3.2): attention
weights are computed again from queries, keys and the log-sum-exp of their scores.
"""

# C rows, T tokens of a row, L tokens of their prompt, H heads, K key heads, R = H / K, D head size

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    q_CTHD: Tensor,
    k_CTKD: Tensor,
    v_CTKD: Tensor,
    prompt_k_LKD: Tensor,
    prompt_v_LKD: Tensor,
    mask_TS: Tensor,
    scale: float,
) -> Tensor:
    """Return the attention output (C, T, H, D) of each row over its prompt and itself.

    `mask_TS` (T, L + T) is True for the keys that a token attends to, the prompt's first. `scale`
    multiplies the scores.
    """
    out: Tensor = _PromptAttention.apply(  # type: ignore[no-untyped-call]
        q_CTHD, k_CTKD, v_CTKD, prompt_k_LKD, prompt_v_LKD, mask_TS, scale
    )
    return out


class _PromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_CTHD: Tensor,
        k_CTKD: Tensor,
        v_CTKD: Tensor,
        prompt_k_LKD: Tensor,
        prompt_v_LKD: Tensor,
        mask_TS: Tensor,
        scale: float,
    ) -> Tensor:
        added_TS = torch.zeros(mask_TS.shape, dtype=q_CTHD.dtype).masked_fill_(~mask_TS, -torch.inf)
        repeats = q_CTHD.shape[2] // k_CTKD.shape[2]
        out_CHTD, logsums_CHT = _FUSED(
            q_CTHD.transpose(1, 2),
            _behind(prompt_k_LKD, k_CTKD, repeats),
            _behind(prompt_v_LKD, v_CTKD, repeats),
            attn_mask=added_TS,
            scale=scale,
        )
        out_CTHD: Tensor = out_CHTD.transpose(1, 2)
        ctx.save_for_backward(
            q_CTHD, k_CTKD, v_CTKD, prompt_k_LKD, prompt_v_LKD, mask_TS, out_CTHD, logsums_CHT
        )
        ctx.scale = scale
        return out_CTHD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_CTHD, k, v, prompt_k, prompt_v, mask_TS, out_CTHD, logsums_CHT = ctx.saved_tensors
        C, T, H, D = q_CTHD.shape
        K, L = k.shape[2], len(prompt_k)
        R, N = H // K, C * H // K * T

        def by_key_head(x_CTHD: Tensor) -> Tensor:
            """Rearrange to (K, C, R, T, D) in float32: heads with the same keys are adjacent."""
            return x_CTHD.float().view(C, T, K, R, D).permute(2, 0, 3, 1, 4).contiguous()

        q_KCRTD = by_key_head(q_CTHD).mul_(ctx.scale)
        grad_KCRTD = by_key_head(gradients[0])
        inner_KCRT1 = (grad_KCRTD * by_key_head(out_CTHD)).sum(-1, keepdim=True)
        logsums_KCRT1 = logsums_CHT.view(C, K, R, T).transpose(0, 1)[..., None]
        hidden_TS = ~mask_TS
        rows = _Rows(q_KCRTD, grad_KCRTD, inner_KCRT1, logsums_KCRT1)

        with _in_tiles(q_CTHD.dtype):
            prompt_keys, prompt_values = (
                x.float().transpose(0, 1).contiguous() for x in (prompt_k, prompt_v)
            )
            grad_q, grad_prompt_k, grad_prompt_v = rows.gradients(
                prompt_keys, prompt_values, hidden_TS[:, :L]
            )
            own_keys, own_values = (
                x.float().permute(2, 0, 1, 3).reshape(K * C, T, D) for x in (k, v)
            )
            own_grad_q, grad_k, grad_v = rows.gradients(own_keys, own_values, hidden_TS[:, L:])
        grad_q = grad_q.view(K, N, D).add_(own_grad_q.view(K, N, D)).mul_(ctx.scale)
        dtype = q_CTHD.dtype
        return (
            grad_q.view(K, C, R, T, D).permute(1, 3, 0, 2, 4).reshape(C, T, H, D).to(dtype),
            grad_k.view(K, C, T, D).permute(1, 2, 0, 3).to(dtype),
            grad_v.view(K, C, T, D).permute(1, 2, 0, 3).to(dtype),
            grad_prompt_k.transpose(0, 1).to(dtype),
            grad_prompt_v.transpose(0, 1).to(dtype),
            None,
            None,
        )


class _Rows(NamedTuple):
    """The queries (K, C, R, T, D) of all rows, and the inputs of their gradients, in float32.

    `grad`: the gradient of the output; `inner`: its inner product with the output; `logsums`: the
    logarithm of the sum of a query's exponentiated scores.
    """

    q_KCRTD: Tensor
    grad_KCRTD: Tensor
    inner_KCRT1: Tensor
    logsums_KCRT1: Tensor

    def gradients(
        self, keys: Tensor, values: Tensor, hidden_TX: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries (B, N, D), keys and values (B, X, D).

        `keys` and `values` are (B, X, D); B is K for the prompt's and K * C for the rows' own.
        `hidden_TX` is True for keys that a token does not attend to.
        """
        B, X, D = keys.shape
        shape = (*self.q_KCRTD.shape[:4], X)
        q, grad = self.q_KCRTD.view(B, -1, D), self.grad_KCRTD.view(B, -1, D)
        weights = torch.bmm(q, keys.mT).view(shape).sub_(self.logsums_KCRT1).exp_()
        if hidden_TX.any():
            weights.masked_fill_(hidden_TX, 0.0)
        grad_scores = torch.bmm(grad, values.mT).view(shape)
        grad_scores.sub_(self.inner_KCRT1).mul_(weights)
        weights, grad_scores = weights.view(B, -1, X), grad_scores.view(B, -1, X)
        return (
            torch.bmm(grad_scores, keys),
            torch.bmm(grad_scores.mT, q),
            torch.bmm(weights.mT, grad),
        )


def _behind(
    prompt_LKD: Tensor,
    own_CTKD: Tensor,
    repeats: int,
) -> Tensor:
    """Return keys or values (C, H, L + T, D): the prompt's, followed by each row's own."""
    prompt = prompt_LKD.expand(len(own_CTKD), -1, -1, -1)
    return torch.cat([prompt, own_CTKD], dim=1).repeat_interleave(repeats, 2).transpose(1, 2)


@contextmanager
def _in_tiles(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 matrix products use bfloat16 with float32 sums, if `dtype` is bfloat16.

    On processors with AMX they then run on its tiles.
    """
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    if dtype == torch.bfloat16:
        products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before
