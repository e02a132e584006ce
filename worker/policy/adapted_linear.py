# ruff: noqa: N803, N806 - tensors are named with their axes
"""A linear layer with a LoRA adapter (arXiv 2106.09685), computed in the type of its weights.

peft casts a layer's inputs and outputs to float32 and back around its adapter, and keeps both for
the backward pass; with small models that takes longer than the products. This layer casts the
adapter's factors instead, which are small. Gradients of the frozen weight are never computed.
"""

# N tokens, I inputs, O outputs, R rank

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


class AdaptedLinear(Linear):  # type: ignore[misc]  # peft has no types
    """The layer of peft with another forward pass, and the same parameters."""

    def forward(
        self,
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return (..., O) for `x` (..., I), in the type of the layer's weights."""
        is_linear = type(self.base_layer) is nn.Linear
        if self.disable_adapters or not is_linear or x.dtype != self.base_layer.weight.dtype:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,) = self.active_adapters
        out: Tensor = _AdaptedProduct.apply(  # type: ignore[no-untyped-call]
            x,
            self.base_layer.weight,
            self.base_layer.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        return out


class _AdaptedProduct(torch.autograd.Function):
    """Compute x @ W.T + bias + scaling * (x @ A.T) @ B.T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        down_RI = a_RI.to(x.dtype)
        up_OR = (b_OR * scaling).to(x.dtype)
        inner_NR = x_NI @ down_RI.T
        # Models may change their inputs in place, which autograd forbids for a view, so `out` is
        # allocated with its final shape.
        out = x.new_empty((*x.shape[:-1], weight_OI.shape[0]))
        out_NO = out.view(-1, weight_OI.shape[0])
        if bias_O is None:
            torch.mm(x_NI, weight_OI.T, out=out_NO)
        else:
            torch.addmm(bias_O, x_NI, weight_OI.T, out=out_NO)
        out_NO.addmm_(inner_NR, up_OR.T)
        ctx.save_for_backward(x_NI, weight_OI, down_RI, up_OR, inner_NR)
        ctx.scaling, ctx.shape, ctx.adapter_dtype = scaling, x.shape, a_RI.dtype
        return out

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x_NI, weight_OI, down_RI, up_OR, inner_NR = ctx.saved_tensors
        g_NO = gradients[0].reshape(-1, weight_OI.shape[0])
        inner_g_NR = g_NO @ up_OR
        x_g = None
        if ctx.needs_input_grad[0]:
            x_g = (g_NO @ weight_OI).addmm_(inner_g_NR, down_RI).view(ctx.shape)
        a_g_RI = (inner_g_NR.T @ x_NI).to(ctx.adapter_dtype)
        b_g_OR = (g_NO.T @ inner_NR).to(ctx.adapter_dtype) * ctx.scaling
        return x_g, None, None, a_g_RI, b_g_OR, None
