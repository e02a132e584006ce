"""LoRA: a few small matrices are trained beside weights that stay as they are (peft).

The adapters sit in the model's own linear layers, so that its forward pass, and with it training, scoring and
transformers' generation, goes through them. Whoever reads a layer's `weight` reads it without its adapter: ask
`has_adapters` first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from worker import settings
from worker.errors import ModelError


def attach(model: Any, lora: settings.Lora) -> None:
    """Put fresh adapters, which change nothing yet, into `model`; from now on only they have gradients.

    The same start everywhere, whatever torch's random state, which stays as it is. float32 also beside bfloat16
    weights. Raises ModelError if the model has no layers of the names that the settings give.
    """
    from peft import LoraConfig, inject_adapter_in_model  # half a second that only LoRA takes

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=_targets(lora), lora_dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
            raise ModelError(
                f"trainer/lora: target_modules {lora.target_modules}: {str(error).splitlines()[0][:200]}; "
                f"this model's linear layers are {', '.join(names)}"
            ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def has_adapters(model: Any) -> bool:
    """Whether some layers of `model` add something to what their weights say."""
    return hasattr(model, "peft_config")


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


def _targets(lora: settings.Lora) -> str | list[str]:
    return "all-linear" if lora.target_modules is None else list(lora.target_modules)
