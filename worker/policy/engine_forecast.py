"""Predict from a model's configuration, without its weights, which engine it would get here."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from worker import settings
from worker.errors import ModelError
from worker.policy import logprobs, lora, memory
from worker.policy.engines.architecture import BOTH_DIRECTIONS, find_obstacle
from worker.policy.model_sizing import find_source_folder, gguf_arguments

LEAN, FORWARD, REFUSED = "lean decoder", "transformers' forward", "refused"
OWN_CACHE = (
    "it has a cache of its own, which our engine does not support; generation.engine: transformers"
    " generates with it, slower"
)


@dataclass(frozen=True, slots=True)
class Outlook:
    """The prediction for a model.

    `way`: the decoder (LEAN, FORWARD, or REFUSED if no decoder can run it). `reason`: the reason
    why it is not the lean one. `packing`: the reason why training takes a row per completion; None:
    batches are packed. `targets`: the layers with LoRA adapters.
    """

    model_type: str
    way: str
    reason: str | None
    packing: str | None
    targets: tuple[str, ...]

    def refuses(self, generation: settings.Generation) -> bool:
        """Return whether a worker with these settings would not start with the model."""
        is_left_to_transformers = self.reason == OWN_CACHE and generation.engine == "transformers"
        return self.way == REFUSED and not is_left_to_transformers

    def lines(self) -> list[str]:
        """Return the lines that `hivewright check --model` prints."""
        if self.way == REFUSED:
            return [f"type: {self.model_type}", f"generation: {REFUSED}: {self.reason}"]
        why = f" ({self.reason})" if self.reason else ""
        packed = "packed, without padding"
        if self.packing:
            packed = f"one row for each completion ({self.packing})"
        return [
            f"type: {self.model_type}",
            f"generation: {self.way}{why}, checked against one plain pass when the worker starts",
            f"training: {packed}",
            f"LoRA: adapters in {', '.join(self.targets) or 'no layer: trainer.lora is refused'}",
        ]


def read(model: settings.Model) -> Outlook:
    """Return the outlook of the configured model.

    Raises ModelError if its configuration is unavailable.
    """
    source, gguf = find_source_folder(model) or model.name, gguf_arguments(model)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **gguf)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"model {model.name}: its configuration can't be read: {memory.reason_of(error)};"
            " expected a folder with a config.json, or a Hugging Face name"
        ) from None
    return judge(config)


def judge(config: Any) -> Outlook:
    """Return the outlook of a model with this configuration, or of its text part."""
    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text, trust_remote_code=False)
    except ValueError:
        reason = (
            f"transformers {transformers.__version__} has no causal language model of this type"
        )
        return Outlook(config.model_type, REFUSED, reason, None, ())
    if type(config) is not type(text) and type(config) not in AutoModelForCausalLM._model_mapping:
        reason = (
            f"its text part ({text.model_type}) can't be loaded by itself; take a text-only model"
        )
        return Outlook(config.model_type, REFUSED, reason, None, ())
    obstacle = find_obstacle(model)
    if refusal := _refusal(model, obstacle):
        return Outlook(config.model_type, REFUSED, refusal, None, ())
    targets = {name.rpartition(".")[2] for name in lora.find_targets(model, None)}
    way = FORWARD if obstacle else LEAN
    return Outlook(
        config.model_type, way, obstacle, logprobs.packing_obstacle(model), tuple(sorted(targets))
    )


def _refusal(
    model: Any,
    obstacle: str | None,
) -> str | None:
    if obstacle == BOTH_DIRECTIONS:
        return f"{BOTH_DIRECTIONS}: it can't be sampled"
    if not logprobs.takes(model, "past_key_values"):
        return OWN_CACHE
    return None
