"""Read, average, try and adopt sets of weights in the place of the trained weights.

A set has a tensor for each of `Trainer.parameters`: all weights of the model, or its adapters.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.trainer import weight_differences
from worker.trainer.trainer import Trainer

WeightSet = Mapping[str, Tensor]
LARGEST = 1e4
"""Limit of a weight's absolute value; the weights of intact models are far below it."""


def read(file: Path) -> dict[str, Tensor]:
    """Return the set in a safetensors file. Raises ValueError if it can't be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from None


def unpack(
    trainer: Trainer,
    file: Path,
    base: WeightSet,
    output: Path,
) -> None:
    """Write the set in a difference (weight_differences.py) as a safetensors file.

    Raises ValueError if the difference is unusable, OSError if `base` can't be read or `output`
    can't be written.
    """
    shapes = {name: parameter.shape for name, parameter in trainer.parameters.items()}
    weights = weight_differences.unpack(file, base, shapes)
    try:
        save_file(weights, output)
    except SafetensorError as error:
        raise OSError(f"{output}: {error}") from None


def current(trainer: Trainer) -> dict[str, Tensor]:
    """Return copies of the trained weights, in the precision of the optimizer's masters."""
    masters = zip(trainer.parameters, trainer.masters, strict=True)
    return {name: master.detach().clone() for name, master in masters}


@torch.no_grad()
def apply(trainer: Trainer, weights: WeightSet) -> None:
    """Replace the trained weights; keep the optimizer's moments."""
    for (name, parameter), master in zip(trainer.parameters.items(), trainer.masters, strict=True):
        parameter.copy_(weights[name])
        # The master gets the float32 value, even if the model's weight has another type.
        master.copy_(weights[name])


def adopt(trainer: Trainer, weights: WeightSet) -> None:
    """Replace the trained weights; set the optimizer's moments, which belong to the old, to 0."""
    apply(trainer, weights)
    for moments in trainer.optimizer.state.values():
        for tensor in moments.values():
            tensor.zero_()


@contextmanager
def tried(trainer: Trainer, weights: WeightSet) -> Iterator[None]:
    """Use other weights inside this context; restore our own bit for bit at its end."""
    own = current(trainer)
    try:
        apply(trainer, weights)
        yield
    finally:
        apply(trainer, own)


def average(sets: Sequence[WeightSet]) -> dict[str, Tensor]:
    """Return the mean of at least one set, in the types of the first.

    The two factors of an adapter are averaged separately, not their product.
    """
    first, *others = sets
    mean: dict[str, Tensor] = {}
    for name, tensor in first.items():
        total = tensor.float()
        for other in others:
            total = total + other[name].to(total.device, torch.float32)
        mean[name] = (total / len(sets)).to(tensor.dtype)
    return mean


def find_misfit(trainer: Trainer, weights: WeightSet) -> str | None:
    """Return why a set can't be this trainer's weights; None: it can."""
    if weights.keys() != trainer.parameters.keys():
        odd = sorted(weights.keys() ^ trainer.parameters.keys())
        return f"names: {odd[0][:80]!r} and {len(odd) - 1} more are missing or unknown"
    for name, parameter in trainer.parameters.items():
        tensor = weights[name]
        if tensor.shape != parameter.shape:
            return f"shape: {name} is {tuple(tensor.shape)}; expected {tuple(parameter.shape)}"
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"type: {name} is {tensor.dtype}; expected float32 or bfloat16"
        if not tensor.abs().amax() < LARGEST:  # also true for NaN
            return f"value: {name} has values that are not finite, or not below {LARGEST:g}"
    return None
