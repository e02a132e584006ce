# ruff: noqa: N806 - tensors are named with their axes
"""Read the parts of a transformers decoder from its modules: products, norms, rotations, windows.

Weights are copied into a layout that makes a decoding step fast: q/k/v and gate/up joined, blocked
or transposed to suit the processor. `Weights.refresh` copies them again when they have changed.
"""

# H query heads, K key heads, D size of a head, S positions

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.policy import lora
from worker.policy.engines import native

_FAMILIES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # depend on the position only
_LAYER_PARTS = {
    "self_attn",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}

BOTH_DIRECTIONS = "attention in both directions"

_BLOCKED_FROM = 1 << 20
"""Weights of at least this size use oneDNN's blocked layout, which is read up to 1.3 times as fast
from memory. A call takes 30 us longer, which is too much for smaller products."""
_ROWS_HINT = 16  # oneDNN lays weights out for about this many rows


class UnknownArchitectureError(Exception):
    """The lean decoder does not implement a part of this model."""


class Product:
    """The product `x @ weight.T + bias` of joined linear layers.

    `orders` permutes the output rows of each layer; None: no permutation. Adapters are not added to
    a 16-bit weight, whose last bit is larger than their contribution; they have products of their
    own, in the type of x.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        dtype: torch.dtype,
        orders: Sequence[Tensor | None] = (),
    ) -> None:
        self._linears = linears
        self._orders = orders or [None] * len(linears)
        self._dtype = dtype
        self._layout = _find_layout(linears, dtype)
        has_adapters = any(lora.plain(linear) is not linear for linear in linears)
        self._is_apart = has_adapters and dtype != torch.float32
        self._down: Tensor | None = None
        self._up: Tensor | None = None
        self._adapter_panels: tuple[native.Panels, native.Panels] | None = None
        self._weight: Any = None
        self.refresh()

    def refresh(self, *, adapters_only: bool = False) -> None:
        if self._is_apart:
            self._read_adapters()
            if adapters_only:
                return
        read = lora.base_weight_of if self._is_apart else lora.weight_of
        weight = self._join([read(linear) for linear in self._linears])
        self._bias: Tensor | None = None
        if any(linear.bias is not None for linear in self._linears):
            self._bias = self._join([_bias_of(linear) for linear in self._linears]).to(self._dtype)
        if self._layout == "panels":
            if self._weight is None:
                self._weight = native.Panels(weight, self._bias, native.load())
            else:
                self._weight.fill(weight, self._bias)
            return
        self._weight = weight.to(self._dtype)
        if self._layout == "blocked":
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, _ROWS_HINT)
        elif self._layout == "transposed":
            self._weight = weight.to(self._dtype).t().contiguous()

    @property
    def panels(self) -> native.Panels | None:
        """Return the weight in the layout of products_*.c; None: it has another layout."""
        return self._weight if self._layout == "panels" else None

    @property
    def adapter_panels(self) -> tuple[native.Panels, native.Panels] | None:
        """Return the adapters' products, down and up, in the layout of products_*.c.

        None: there are no adapters, or they are part of the weight.
        """
        return self._adapter_panels

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs), in the type of x."""
        product: Tensor
        if self._layout == "panels":
            product = self._weight(x)
        elif self._layout == "blocked":
            rounded = torch.ops.mkldnn._linear_pointwise(
                x.to(self._dtype), self._weight, self._bias, "none", [], ""
            )
            product = rounded.to(x.dtype)
        elif self._layout == "plain":
            product = functional.linear(x, self._weight, self._bias)
        else:
            product = (
                x @ self._weight if self._bias is None else torch.addmm(self._bias, x, self._weight)
            )
        if self._adapter_panels is not None:
            down, up = self._adapter_panels
            return product.add_(up(down(x)))
        if self._down is None or self._up is None:
            return product
        return product + (x @ self._down.to(x.dtype)) @ self._up.to(x.dtype)

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        ordered = [
            t.detach() if o is None else t.detach()[o]
            for t, o in zip(tensors, self._orders, strict=True)
        ]
        return ordered[0] if len(ordered) == 1 else torch.cat(ordered)

    def _read_adapters(self) -> None:
        """Join all adapters into one pair of products; the second is block-diagonal by layer."""
        factors = [lora.factors_of(linear) for linear in self._linears]
        ups = [up if o is None else up[o] for (_, up), o in zip(factors, self._orders, strict=True)]
        down = torch.cat([down for down, _ in factors])
        up = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
        if self._layout != "panels":
            self._down, self._up = down.t().contiguous(), up.t().contiguous()
        elif self._adapter_panels is None:
            functions = native.load()
            self._adapter_panels = (
                native.Panels(down, None, functions),
                native.Panels(up, None, functions),
            )
        else:
            for panels, weight in zip(self._adapter_panels, (down, up), strict=True):
                panels.fill(weight, None)


class Norm:
    """An RMS norm over the last axis, with the offset that some families add to its weight."""

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
    ) -> None:
        self._module = module
        self._dtype = dtype
        self.eps = eps_of(module)
        self.refresh()

    def refresh(self) -> None:
        self.weight = norm_weight(self._module)
        self._rounded = self.weight.to(self._dtype)

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.weight if x.dtype == torch.float32 else self._rounded
        return functional.rms_norm(x, weight.shape, weight, self.eps)


class HeadNorm:
    """The norms of query heads and key heads, computed together over (R, H + K, D)."""

    def __init__(
        self,
        queries: nn.Module,
        keys: nn.Module,
        num_heads: int,
        num_kv_heads: int,
        order: Tensor,
    ) -> None:
        self._modules = ((queries, num_heads), (keys, num_kv_heads))
        self._order = order
        self.eps = eps_of(queries)
        self.refresh()

    def refresh(self) -> None:
        parts = [
            norm_weight(module)[self._order].expand(repeats, -1)
            for module, repeats in self._modules
        ]
        self.weight = torch.cat(parts)

    def __call__(self, heads: Tensor) -> Tensor:
        return functional.rms_norm(heads, heads.shape[-1:], None, self.eps).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a decoder.

    `window` is the number of keys that a token sees, including its own; None: all. `rope` is the
    name of its rotation.
    """

    attention_norm: Norm
    qkv: Product
    head_norm: HeadNorm | None
    attention_out: Product
    attention_post_norm: Norm | None
    mlp_norm: Norm
    gate_up: Product
    activation: Any
    down: Product
    mlp_post_norm: Norm | None
    window: int | None
    rope: str

    @property
    def products(self) -> list[Product]:
        return [self.qkv, self.attention_out, self.gate_up, self.down]

    @property
    def parts(self) -> list[Any]:
        named = (
            self.attention_norm,
            self.qkv,
            self.head_norm,
            self.attention_out,
            self.attention_post_norm,
            self.mlp_norm,
            self.gate_up,
            self.down,
            self.mlp_post_norm,
        )
        return [part for part in named if part is not None]


class Weights:
    """A decoder's layers in `dtype`, with its embedding, last norm and output layer.

    Raises UnknownArchitectureError for a model that the lean decoder does not implement.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
    ) -> None:
        obstacle = find_obstacle(model)
        if obstacle:
            raise UnknownArchitectureError(obstacle)
        config, attention = model.config, model.model.layers[0].self_attn
        self._model = model
        self.dtype = dtype
        self.device: torch.device = model.device
        # Between the products a CPU computes in float32, whatever the type of the weights.
        self.activation_dtype = torch.float32 if self.device.type == "cpu" else dtype
        self.head_dim = int(attention.head_dim)
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        self.mlp_size = int(model.model.layers[0].mlp.down_proj.in_features)
        self.num_tokens = int(model.get_output_embeddings().weight.shape[0])
        self.scale = float(attention.scaling)
        # Gemma 3 has this attribute too, but does not use it.
        is_capped = config.model_type == "gemma2"
        self.score_cap = getattr(config, "attn_logit_softcapping", None) if is_capped else None
        self.logit_cap = getattr(config, "final_logit_softcapping", None)
        self.embed = model.get_input_embeddings()
        # Numbers that rotate together are adjacent, so a rotation is one complex multiplication.
        first = torch.arange(self.head_dim // 2)
        pairs = torch.stack([first, first + self.head_dim // 2], 1)
        self._order_D = pairs.flatten().to(self.device)
        self.layers = [self._read_layer(layer, i) for i, layer in enumerate(model.model.layers)]
        self.norm = Norm(model.model.norm, dtype)
        self.head = Product([model.get_output_embeddings()], dtype)
        self._rotations: dict[str, Tensor] = {}
        self._seen = fingerprint(model)

    def refresh(self) -> None:
        """Copy the model's weights again if they have changed, or only the changed adapters."""
        seen = fingerprint(self._model)
        if seen == self._seen:
            return
        names = (name for name, _ in self._model.named_parameters())
        sums = zip(names, seen, self._seen, strict=True)
        changed = [name for name, new, old in sums if new != old]
        adapters_only = all(map(lora.is_of_adapter, changed))
        parts = [part for layer in self.layers for part in layer.parts]
        for part in [*parts, self.norm, self.head]:
            if isinstance(part, Product):
                part.refresh(adapters_only=adapters_only)
            else:
                part.refresh()
        self._seen = seen

    @property
    def are_panels(self) -> bool:
        """Return whether all products are computed by products_*.c."""
        products = [product for layer in self.layers for product in layer.products]
        return all(product.panels is not None for product in [*products, self.head])

    def rotations(self, num_positions: int) -> dict[str, Tensor]:
        """Return complex rotations (S, D / 2) of at least `num_positions` positions, by name."""
        if not self._rotations or next(iter(self._rotations.values())).shape[0] < num_positions:
            positions = torch.arange(max(256, 2 * num_positions), device=self.device)[None]
            like = torch.empty(0, device=self.device)
            rotary = self._model.model.rotary_emb
            for name in {layer.rope for layer in self.layers}:
                cos, sin = rotary(like, positions, name) if name else rotary(like, positions)
                half = self.head_dim // 2
                self._rotations[name] = torch.complex(
                    cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
                )
        return self._rotations

    def _read_layer(self, layer: Any, index: int) -> Layer:
        attention, mlp, dtype = layer.self_attn, layer.mlp, self.dtype
        starts_H = torch.arange(self.num_heads, device=self.device)[:, None] * self.head_dim
        orders = [
            (starts_H + self._order_D).flatten(),
            (starts_H[: self.num_kv_heads] + self._order_D).flatten(),
            None,
        ]
        head_norm = None
        if hasattr(attention, "q_norm"):
            head_norm = HeadNorm(
                attention.q_norm, attention.k_norm, self.num_heads, self.num_kv_heads, self._order_D
            )
        has_post_norms = hasattr(layer, "pre_feedforward_layernorm")
        post_norm = Norm(layer.post_attention_layernorm, dtype)
        return Layer(
            attention_norm=Norm(layer.input_layernorm, dtype),
            qkv=Product([attention.q_proj, attention.k_proj, attention.v_proj], dtype, orders),
            head_norm=head_norm,
            attention_out=Product([attention.o_proj], dtype),
            attention_post_norm=post_norm if has_post_norms else None,
            mlp_norm=Norm(layer.pre_feedforward_layernorm, dtype) if has_post_norms else post_norm,
            gate_up=Product([mlp.gate_proj, mlp.up_proj], dtype),
            activation=mlp.act_fn,
            down=Product([mlp.down_proj], dtype),
            mlp_post_norm=Norm(layer.post_feedforward_layernorm, dtype) if has_post_norms else None,
            window=_window_of(attention, self._model.config),
            rope=self._model.config.layer_types[index]
            if _has_named_ropes(self._model.config)
            else "",
        )


def fingerprint(model: nn.Module) -> list[int]:
    """Return a sum over the bits of each weight, adapters included, to detect changes.

    torch's `_version` does not suffice: fused AdamW does not increase it.
    """
    sums = [_sum_bits(parameter.detach()) for parameter in model.parameters()]
    return [int(n) for n in torch.stack(sums).tolist()]


def _find_layout(
    linears: Sequence[nn.Linear],
    dtype: torch.dtype,
) -> str:
    """Return a weight's layout.

    It is "plain" (a GPU), "transposed" (MKL), "blocked" (oneDNN) or "panels" (products_*.c).
    """
    size = sum(linear.weight.numel() for linear in linears)
    if linears[0].weight.device.type != "cpu":
        return "plain"
    is_large = size >= _BLOCKED_FROM
    if dtype == torch.bfloat16 and native.load() is not None:
        return "panels"
    is_blocked = torch._C._has_mkldnn and (is_large or dtype == torch.bfloat16)
    return "blocked" if is_blocked else "transposed"


def _sum_bits(weight: Tensor) -> Tensor:
    """Return a 64-bit sum over a weight's bits, eight bytes at a time, at the memory's speed."""
    flat = weight.reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    whole = octets.numel() // 8 * 8
    return octets[:whole].view(torch.int64).sum() + octets[whole:].sum()


def norm_weight(module: nn.Module) -> Tensor:
    """Return the factor of an RMS norm, measured with ones: some families add 1 to the weight."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    with torch.no_grad():
        ones = torch.ones(weight.shape, device=weight.device)
        weight = module(ones) * (1 + eps_of(module)) ** 0.5
    return weight.float()


def eps_of(module: Any) -> float:
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)


def _bias_of(linear: nn.Linear) -> Tensor:
    bias: Tensor | None = linear.bias
    return linear.weight.new_zeros(linear.out_features) if bias is None else bias


def _window_of(attention: Any, config: Any) -> int | None:
    # Mistral's attention has no such attribute: all layers have the window of the configuration.
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return None if window is None else int(window)


def _has_named_ropes(config: Any) -> bool:
    return "rope_type" not in config.rope_parameters


def find_obstacle(model: Any) -> str | None:
    """Return the part of `model` that the lean decoder does not implement; None: there is none."""
    config = model.config
    if config.model_type not in _FAMILIES:
        return f"family {config.model_type}"
    ropes = (
        config.rope_parameters.values() if _has_named_ropes(config) else [config.rope_parameters]
    )
    for rope in ropes:
        if rope["rope_type"] not in _ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
            return f"rotation {rope['rope_type']}"
    if getattr(config, "use_bidirectional_attention", False):
        return BOTH_DIRECTIONS
    for layer in model.model.layers:
        for module, known in (
            (layer, _LAYER_PARTS),
            (layer.self_attn, _ATTENTION_PARTS),
            (layer.mlp, _MLP_PARTS),
        ):
            for name, child in module.named_children():
                if name not in known:
                    return f"part {name}"
                if name.endswith("_proj") and type(lora.plain(child)) is not nn.Linear:
                    return f"{name} of type {type(child).__name__}"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "several devices"
    return None
