"""LoRA: train small matrices next to frozen weights, with peft.

The adapters are inside the model's linear layers, so training, scoring and transformers'
generation use them. A layer's attribute `weight` does not include its adapter; `weight_of` and
`merged_weights` do.
"""

import copy
import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from worker import settings
from worker.errors import ModelError

_LINEAR = (torch.nn.Linear, Conv1D)
_ADAPTER = "default"  # peft's name of the only adapter
_NUM_COMPARED = 64
"""Number of values per weight in a fingerprint."""


def attach(model: Any, lora: settings.Lora) -> None:
    """Add new adapters, which change no output yet, to `model`; only they have gradients then.

    Their initial values are the same everywhere, and torch's random state does not change. They are
    float32, also with bfloat16 weights. Raises ModelError if no layer has a name in the settings.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes half a second

    from worker.policy.adapted_linear import AdaptedLinear

    targets = find_targets(model, lora.target_modules)
    if not targets:
        names = sorted(
            {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, _LINEAR)}
        )
        raise ModelError(
            f"trainer.lora: target_modules {lora.target_modules}: no layer of these names; "
            f"this model's linear layers are {', '.join(names)}"
        )
    pattern = "|".join(re.escape(f"model.{target}") for target in targets)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=pattern, lora_dropout=0.0
    )
    config._register_custom_module({torch.nn.Linear: AdaptedLinear})
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        # peft detects the transposed weights of GPT-2 layer by layer, so its warning is wrong.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        try:
            inject_adapter_in_model(config, _Nameless(model))
        except ValueError as error:
            reason = str(error).splitlines()[0][:200]
            raise ModelError(
                f"trainer.lora: target_modules {lora.target_modules}: {reason}"
            ) from error
    model.peft_config = {_ADAPTER: config}
    _refuse_tied(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def use_peft_layers(model: Any) -> None:
    """Restore peft's forward pass in adapted layers, for comparisons."""
    from peft.tuners.lora import Linear

    from worker.policy.adapted_linear import AdaptedLinear

    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.__class__ = Linear


class _Nameless(torch.nn.Module):
    """A wrapper that hides a model's type: peft adds adapters to the experts of types it knows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


def find_targets(
    model: Any,
    wanted: Sequence[str] | None,
) -> list[str]:
    """Return the names of the layers to adapt: those named `wanted`; None: all suitable ones.

    All linear layers are suitable except the output layer, the routers of experts (which are not
    plain linear layers), and layers whose weights a Mamba mixer's kernels read without calling the
    layer: an adapter there would not be trained, but still be merged.
    """
    layers = dict(model.named_modules())
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, _LINEAR)}
    if wanted is not None:
        return [
            name for name in linear if any(f".{name}".endswith(f".{suffix}") for suffix in wanted)
        ]
    head = model.get_output_embeddings()
    return [
        name
        for name, layer in linear.items()
        if type(layer) in _LINEAR
        and layer is not head
        and not _is_read_raw(name, layers[name.rpartition(".")[0]])
    ]


def _is_read_raw(name: str, owner: Any) -> bool:
    return (
        hasattr(owner, "A_log") and hasattr(owner, "D") and name.endswith((".dt_proj", ".out_proj"))
    )


def fingerprint(model: Any) -> str:
    """Return a digest of some values of each frozen weight, which differs between models."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            values = parameter.detach().flatten()
            # As bfloat16, because the same model may be loaded in that type on another machine.
            some = values[:: max(1, values.numel() // _NUM_COMPARED)].bfloat16().cpu()
            digest.update(name.encode() + some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def has_adapters(model: Any) -> bool:
    """Return whether layers of `model` have adapters."""
    return hasattr(model, "peft_config")


def plain(layer: Any) -> Any:
    """Return the model's own layer inside an adapted one, or `layer` if it has no adapter."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def is_of_adapter(name: str) -> bool:
    """Return whether a parameter of this name belongs to an adapter."""
    return any(part.startswith("lora_") for part in name.split("."))


def base_weight_of(layer: Any) -> Tensor:
    """Return the weight of a layer without its adapter."""
    weight: Tensor = plain(layer).weight
    return weight


@torch.no_grad()
def factors_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Return the factors (r, inputs) and (outputs, r) of a layer's adapter.

    The adapter adds the second times the first to the weight. Without an adapter r is 0.
    """
    weight = base_weight_of(layer)
    if plain(layer) is layer:
        return weight.new_empty((0, weight.shape[1])), weight.new_empty((weight.shape[0], 0))
    down, up = layer.lora_A[_ADAPTER].weight.detach(), layer.lora_B[_ADAPTER].weight.detach()
    return down, up * layer.scaling[_ADAPTER]


@torch.no_grad()
def weight_of(layer: Any) -> Tensor:
    """Return the weight of a layer with its adapter merged.

    It is float32 if there is an adapter, because bfloat16 would lose the small values of a young
    adapter; otherwise it has the weight's type.
    """
    weight: Tensor = plain(layer).weight
    if plain(layer) is layer:
        return weight
    added: Tensor = layer.get_delta_weight(_ADAPTER)
    return weight.float() + added.float()


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights of the plain model by its own names, with adapters merged.

    Tied weights are yielded once. Buffers that belong to the model's files are included.
    """
    yield from ((name, buffer.detach()) for name, buffer in _saved_buffers(model))
    layers = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            yield (
                f"{owner}.{last}",
                weight_of(layers[owner]) if last == "weight" else parameter.detach(),
            )
        elif not is_of_adapter(name):
            yield name, parameter.detach()


def merged_weights_as(
    model: Any,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Yield `merged_weights` in another type; bfloat16 keeps the adapters' values on average.

    Rounding to nearest would lose most of a young adapter, and vLLM would sample the old policy.
    """
    modules = model.named_modules()
    adapted = {f"{name}.weight" for name, layer in modules if plain(layer) is not layer}
    for seed, (name, weight) in enumerate(merged_weights(model)):
        if dtype is torch.bfloat16 and name in adapted:
            yield name, _round_at_random(weight.float(), seed)
        else:
            yield name, weight.to(dtype)


@torch.no_grad()
def _round_at_random(weight: Tensor, seed: int) -> Tensor:
    """Return a float32 weight as bfloat16, randomly rounded so that its mean is kept.

    bfloat16 is the upper half of float32. A random number is added to the lower half, so that its
    carry rounds up; values that bfloat16 has exactly do not change. The same seed gives the same
    result.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    lower = torch.randint(
        0, 1 << 16, weight.shape, dtype=torch.int32, device=weight.device, generator=generator
    )
    rounded = (weight.contiguous().view(torch.int32) + lower) & -(1 << 16)
    return rounded.view(torch.float32).bfloat16()


def has_more_than_parameters(model: Any) -> bool:
    """Return whether a model's files have buffers in addition to its parameters."""
    return next(_saved_buffers(model), None) is not None


def _saved_buffers(model: Any) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def save_merged(model: Any, file: Path) -> None:
    """Write all weights of the plain model; raise OSError or SafetensorError if that fails."""
    weights = {name: weight.cpu().contiguous() for name, weight in merged_weights(model)}
    save_file(weights, file, metadata={"format": "pt"})


def save_config(model: Any, folder: Path) -> None:
    """Write the configuration for `save_merged`, whose merged weights are always float32."""
    config = copy.deepcopy(model.config)
    if has_adapters(model):
        config.dtype = torch.float32
    config.save_pretrained(folder)


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """Switch adapters off inside this context, for passes of the untrained model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _refuse_tied(model: Any, lora: settings.Lora) -> None:
    """Raise ModelError for an adapter on a tied weight: merging it would change both layers."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = plain(head).weight is plain(embedding).weight
    if is_tied and any(plain(layer) is not layer for layer in (head, embedding)):
        raise ModelError(
            f"trainer.lora: target_modules {lora.target_modules}: this model's output layer and its"
            " embedding are one weight, which can't have an adapter; take them out"
        )
