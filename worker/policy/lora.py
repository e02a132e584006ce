"""LoRA: a few small matrices are trained next to weights that stay as they are (peft).

The adapters sit in the model's own linear layers, so that its forward pass, and with it training,
scoring and transformers' generation, goes through them. Whoever reads a layer's `weight` reads it
without its adapter: `weight_of` and `merged_weights` read it with it.
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
_ADAPTER = "default"  # peft's name for the only one
_NUM_COMPARED = 64
"""Values of a weight that are enough to tell it from another model's."""


def attach(model: Any, lora: settings.Lora) -> None:
    """Put fresh adapters, which change nothing yet, into `model`; from now on only they have
    gradients.

    The same start everywhere, whatever torch's random state, which stays as it is. float32 also
    next to bfloat16 weights. Raises ModelError if the model has no layers of the names that the
    settings give.
    """
    from peft import LoraConfig, inject_adapter_in_model  # half a second that only LoRA takes

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
        # It finds out for itself, layer by layer, in which order GPT-2's weights are.
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
    """Give adapted layers peft's own forward pass, to compare with it."""
    from peft.tuners.lora import Linear

    from worker.policy.adapted_linear import AdaptedLinear

    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.__class__ = Linear


class _Nameless(torch.nn.Module):
    """A model without its type: peft would put adapters into the experts of types that it knows,
    too."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


def find_targets(model: Any, wanted: Sequence[str] | None) -> list[str]:
    """Names of the linear layers that adapters go into: those called `wanted`; None: all but the
    output layer.

    Left out, where none are named, are routers of experts, which are no plain linear layers, and
    what a Mamba mixer's kernels read without calling it: an adapter there would learn nothing, and
    be merged in the end.
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
    """Of the weights that adapters are attached to: some values of each, of whatever type. Two
    models differ in it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            values = parameter.detach().flatten()
            # As bfloat16: the same model may be loaded as float32 today, and on another machine as
            # bfloat16.
            some = values[:: max(1, values.numel() // _NUM_COMPARED)].bfloat16().cpu()
            digest.update(name.encode() + some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def has_adapters(model: Any) -> bool:
    """Return whether some layers of `model` add something to what their weights say."""
    return hasattr(model, "peft_config")


def plain(layer: Any) -> Any:
    """The layer of the model itself, where an adapter sits in it."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def is_of_adapter(name: str) -> bool:
    """Return whether a parameter of this name is an adapter's."""
    return any(part.startswith("lora_") for part in name.split("."))


def base_weight_of(layer: Any) -> Tensor:
    """The weight of a layer without its adapter."""
    weight: Tensor = plain(layer).weight
    return weight


@torch.no_grad()
def factors_of(layer: Any) -> tuple[Tensor, Tensor]:
    """(r, inputs) and (outputs, r): what a layer's adapter adds is their product, the second times
    the first.

    Of a layer without an adapter r is 0.
    """
    weight = base_weight_of(layer)
    if plain(layer) is layer:
        return weight.new_empty((0, weight.shape[1])), weight.new_empty((weight.shape[0], 0))
    down, up = layer.lora_A[_ADAPTER].weight.detach(), layer.lora_B[_ADAPTER].weight.detach()
    return down, up * layer.scaling[_ADAPTER]


@torch.no_grad()
def weight_of(layer: Any) -> Tensor:
    """The weight of a layer with what its adapter adds to it: in float32 where there is one, of the
    weight's type else.

    bfloat16 would lose it: what a young adapter adds is far below the last of its eight bits.
    """
    weight: Tensor = plain(layer).weight
    if plain(layer) is layer:
        return weight
    added: Tensor = layer.get_delta_weight(_ADAPTER)
    return weight.float() + added.float()


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """All weights of the plain model by its own names, adapters merged in, one after the other.
    Tied ones come once.

    A model without adapters gives its own. Buffers that belong to a model's files come too.
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


def merged_weights_as(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """`merged_weights` in another type. What adapters add to bfloat16 weights is kept on average.

    Rounded to the nearest, most of what a young adapter adds would be lost, and the old policy
    would be sampled.
    """
    adapted = {
        f"{name}.weight" for name, layer in model.named_modules() if plain(layer) is not layer
    }
    for seed, (name, weight) in enumerate(merged_weights(model)):
        if dtype is torch.bfloat16 and name in adapted:
            yield name, _round_at_random(weight.float(), seed)
        else:
            yield name, weight.to(dtype)


@torch.no_grad()
def _round_at_random(weight: Tensor, seed: int) -> Tensor:
    """Return a float32 weight as bfloat16, rounded up or down so that its mean is kept; the same
    for the same seed.

    bfloat16 is the upper half of float32: a random lower half is added to that of the weight, and
    what is carried over counts. What bfloat16 has exactly stays as it is.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    lower = torch.randint(
        0, 1 << 16, weight.shape, dtype=torch.int32, device=weight.device, generator=generator
    )
    return (
        ((weight.contiguous().view(torch.int32) + lower) & -(1 << 16))
        .view(torch.float32)
        .bfloat16()
    )


def has_more_than_parameters(model: Any) -> bool:
    """Return whether a model's files have more than its parameters: a checkpoint of these alone is
    not a whole model."""
    return next(_saved_buffers(model), None) is not None


def _saved_buffers(model: Any) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def save_merged(model: Any, file: Path) -> None:
    """Write all weights of the plain model. Raises OSError or SafetensorError if the disk does not
    take them."""
    save_file(
        {n: w.cpu().contiguous() for n, w in merged_weights(model)}, file, metadata={"format": "pt"}
    )


def save_config(model: Any, folder: Path) -> None:
    """Write the configuration that goes with `save_merged`: merged weights are float32, whatever
    the model has."""
    config = copy.deepcopy(model.config)
    if has_adapters(model):
        config.dtype = torch.float32
    config.save_pretrained(folder)


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """The model without its adapters: what it was before training. For passes without gradients."""
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
    """Raises ModelError for an adapter in a weight that the model has twice: merged, it would
    change the other, too."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = plain(head).weight is plain(embedding).weight
    if is_tied and any(plain(layer) is not layer for layer in (head, embedding)):
        raise ModelError(
            f"trainer.lora: target_modules {lora.target_modules}: this model's output layer and its"
            " embedding are one weight, which can't have an adapter; take them out"
        )
