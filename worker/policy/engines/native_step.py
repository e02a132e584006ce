# ruff: noqa: N803, N806 - tensors are named with their axes
"""Run a whole decoding step as one call of step.c: its structures and its scratch buffers."""

# R rows, H query heads, K key heads, D size of a head, L tokens of the longest prompt, V vocabulary

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from worker.policy.engines import native
from worker.policy.engines.architecture import HeadNorm, Layer, Norm, Product, Weights

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_NORMS = ("attention_norm", "head_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
_PRODUCTS = ("qkv", "attention_out", "gate_up", "down")
_CACHES = ("prompt_keys", "prompt_values", "keys", "values")
_ROOMS = (
    *("x", "normed", "added", "terms", "qkv", "attended", "gate_up", "gated", "scores"),
    *("lowered", "raised", "out"),
)


class _Product(ctypes.Structure):
    _fields_ = (
        ("panels", _POINTER),
        ("bias", _POINTER),
        ("num_outputs", _INT),
        ("num_inputs", _INT),
        ("down", _POINTER),
        ("up", _POINTER),
        ("rank", _INT),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("eps", _FLOAT))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in _NORMS),
        *((name, _Product) for name in _PRODUCTS),
        *((name, _POINTER) for name in ("turn", *_CACHES)),
        ("window", _INT),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", _Norm),
        ("head", _Product),
        *((name, _POINTER) for name in ("prompt_of", "lengths", *_ROOMS, "blocks")),
        *(
            (name, _INT)
            for name in ("num_layers", "R", "H", "K", "D", "L", "room", "step", "is_gelu")
        ),
        *((name, _FLOAT) for name in ("scale", "score_cap")),
    )


class Step:
    """Decoding steps of `num_rows` rows.

    `caches` has the prompt keys, prompt values, keys and values of each layer.
    """

    def __init__(
        self,
        weights: Weights,
        num_rows: int,
        caches: Sequence[Sequence[Tensor]],
    ) -> None:
        R, H, K, D = num_rows, weights.num_heads, weights.num_kv_heads, weights.head_dim
        L, room = caches[0][1].shape[2], caches[0][3].shape[2]
        self._ropes = [layer.rope for layer in weights.layers]
        self._layers = (_Layer * len(weights.layers))(*map(_describe, weights.layers, caches))
        head = _panels_of(weights.head)
        hidden, mlp = head.num_inputs, weights.mlp_size
        sizes = {
            **dict.fromkeys(("normed", "added", "terms"), hidden),
            "qkv": (H + 2 * K) * D,
            "attended": H * D,
            "gate_up": 2 * mlp,
            "gated": mlp,
            "scores": K * native.QUERIES * (L + room),
        }
        products = [*(p for layer in weights.layers for p in layer.products), weights.head]
        adapters = [p.adapter_panels for p in products if p.adapter_panels is not None]
        sizes["lowered"] = max((down.num_outputs for down, _ in adapters), default=0)
        sizes["raised"] = max((up.num_outputs for _, up in adapters), default=0)
        self._rooms = {name: torch.empty(R, size) for name, size in sizes.items()}
        panels = [*map(_panels_of, products), *(one for pair in adapters for one in pair)]
        self._blocks = torch.empty(max(p.block_bytes(R) for p in panels), dtype=torch.uint8)
        self._num_tokens = weights.num_tokens
        self._batch = _Batch(
            layers=self._layers,
            norm=_describe_norm(weights.norm),
            head=_describe_product(weights.head),
            **{name: tensor.data_ptr() for name, tensor in self._rooms.items()},
            blocks=self._blocks.data_ptr(),
            num_layers=len(caches),
            **dict(zip("RHKDL", (R, H, K, D, L), strict=True)),
            room=room,
            is_gelu=native.is_gelu(weights.layers[0].activation),
            scale=weights.scale,
            score_cap=weights.score_cap or 0.0,
        )

    def run(
        self,
        functions: Any,
        x: Tensor,
        turns: Mapping[str, Tensor],
        prompt_of_R: Tensor,
        lengths_R: Tensor,
        step: int,
    ) -> Tensor:
        """Return the logits (R, V) after tokens with the embeddings `x` (R, hidden).

        `x` is overwritten.
        """
        for layer, rope in zip(self._layers, self._ropes, strict=True):
            layer.turn = turns[rope].data_ptr()
        logits_RV = x.new_empty((len(x), self._num_tokens))
        batch = self._batch
        batch.x, batch.out, batch.step = x.data_ptr(), logits_RV.data_ptr(), step
        batch.prompt_of, batch.lengths = prompt_of_R.data_ptr(), lengths_R.data_ptr()
        functions.run_step(ctypes.addressof(batch))
        return logits_RV


def _describe(layer: Layer, caches: Sequence[Tensor]) -> _Layer:
    products = zip(_PRODUCTS, layer.products, strict=True)
    return _Layer(
        **{name: _describe_norm(getattr(layer, name)) for name in _NORMS},
        **{name: _describe_product(product) for name, product in products},
        **{name: cache.data_ptr() for name, cache in zip(_CACHES, caches, strict=True)},
        window=layer.window or 0,
    )


def _panels_of(product: Product) -> native.Panels:
    if product.panels is None:
        raise TypeError("a step in C needs all products from products_*.c: see Weights.are_panels")
    return product.panels


def _describe_product(product: Product) -> _Product:
    adapters = product.adapter_panels
    if adapters is None:
        return _Product(*_panels_of(product).fields())
    down, up = adapters
    return _Product(
        *_panels_of(product).fields(), down.fields()[0], up.fields()[0], down.num_outputs
    )


def _describe_norm(norm: Norm | HeadNorm | None) -> _Norm:
    return _Norm() if norm is None else _Norm(norm.weight.data_ptr(), norm.eps)
