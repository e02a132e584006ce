"""LoRA: a few small matrices are trained beside weights that stay as they are (peft).

The adapters sit in the model's own linear layers, so that its forward pass, and with it training, scoring and
transformers' generation, goes through them. Whoever reads a layer's `weight` reads it without its adapter: `weight_of`
and `merged_weights` read it with it.
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from worker import settings
from worker.errors import ModelError

_ADAPTER = "default"  # peft's name for the only one
_NUM_COMPARED = 64
"""Values of a weight that are enough to tell it from another model's."""


def attach(model: Any, lora: settings.Lora) -> None:
    """Put fresh adapters, which change nothing yet, into `model`; from now on only they have gradients.

    The same start everywhere, whatever torch's random state, which stays as it is. float32 also beside bfloat16
    weights. Raises ModelError if the model has no layers of the names that the settings give.
    """
    from peft import LoraConfig, inject_adapter_in_model  # half a second that only LoRA takes

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=_targets(lora), lora_dropout=0.0)
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        # It finds out for itself, layer by layer, which way round GPT-2's weights are.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
            raise ModelError(
                f"trainer/lora: target_modules {lora.target_modules}: {str(error).splitlines()[0][:200]}; "
                f"this model's linear layers are {', '.join(names)}"
            ) from error
    _refuse_tied(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def fingerprint(model: Any) -> str:
    """Of the weights that adapters sit beside: some values of each, of whatever type. Two models differ in it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            values = parameter.detach().flatten()
            # As bfloat16: the same model may be loaded as float32 today, and on another machine as bfloat16.
            some = values[:: max(1, values.numel() // _NUM_COMPARED)].bfloat16().cpu()
            digest.update(name.encode() + some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def has_adapters(model: Any) -> bool:
    """Whether some layers of `model` add something to what their weights say."""
    return hasattr(model, "peft_config")


def plain(layer: Any) -> Any:
    """The layer of the model itself, where an adapter sits in it."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


@torch.no_grad()
def weight_of(layer: Any) -> Tensor:
    """The weight of a layer with what its adapter adds to it, of the weight's type."""
    weight: Tensor = plain(layer).weight
    if plain(layer) is layer:
        return weight
    added: Tensor = layer.get_delta_weight(_ADAPTER)
    return (weight.float() + added.float()).to(weight.dtype)


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """All weights of the plain model by its own names, adapters merged in, one after the other. Tied ones come once.

    A model without adapters gives its own.
    """
    layers = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            yield f"{owner}.{last}", weight_of(layers[owner]) if last == "weight" else parameter.detach()
        elif not any(part.startswith("lora_") for part in name.split(".")):
            yield name, parameter.detach()


def save_merged(model: Any, file: Path) -> None:
    """Write all weights of the plain model. Raises OSError or SafetensorError if the disk does not take them."""
    save_file({n: w.cpu().contiguous() for n, w in merged_weights(model)}, file, metadata={"format": "pt"})


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
    """Raises ModelError for an adapter in a weight that the model has twice: merged, it would change the other, too."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = plain(head).weight is plain(embedding).weight
    if is_tied and any(plain(layer) is not layer for layer in (head, embedding)):
        raise ModelError(
            f"trainer/lora: target_modules {lora.target_modules}: this model's output layer and its embedding are one "
            "weight, which can't have an adapter; take them out"
        )


def _targets(lora: settings.Lora) -> str | list[str]:
    return "all-linear" if lora.target_modules is None else list(lora.target_modules)
