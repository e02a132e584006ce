# ruff: noqa: N806 - tensors are named with their axes
"""Measure the error of a decoder: compare its logits with those of a plain pass in float32.

The plain pass has neither a cache nor padding before a prompt. Transformers' own pass in the
decoder's precision shows the error of that precision; a decoder's error may be somewhat larger.
Weights are cast one layer at a time, so the check never needs a second copy of the model.
"""

# R rows, S steps, V vocabulary

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from worker.policy.engines.engine import Decoder
from worker.policy.lora import is_of_adapter

QUESTIONS = (
    "Calculate 12 + 34 - 5.",
    (
        "A farmer has seven sheep, three dogs and two hens. How many legs do the animals have in"
        " total? Give a number."
    ),
    "Which day of the week is it three days after a Tuesday?",
)
"""Questions for callers that do not have the environment's."""

STEPS = 4
"""Number of positions to compare: the last ones of a prompt. The tokens before them are
prefilled."""
_LONGEST = (96, 32, 24)
"""Prompts are cut to their first tokens, this many, so that the check takes only seconds on a slow
processor."""
_FLOOR = 1e-3
"""Usual difference between two float32 computations of the same logits, relative to their
standard deviation."""


def shorten(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return at most three prompts of more than STEPS tokens, with the long ones cut."""
    chosen = [list(prompt) for prompt in prompts if len(prompt) > STEPS][: len(_LONGEST)]
    return [prompt[:longest] for prompt, longest in zip(chosen, _LONGEST, strict=False)]


def arbitrary_prompts(num_tokens: int) -> list[list[int]]:
    """Return prompts of arbitrary token ids, for a model without a tokenizer."""
    return [[(7 * i + 3) % num_tokens for i in range(length)] for length in (24, 13, 9)]


def allowed_error(theirs: float, factor: float) -> float:
    """Return a decoder's largest allowed distance from float32.

    `theirs` is the distance of transformers' own pass in the decoder's precision.
    """
    return factor * theirs + _FLOOR


def difference(ours: Tensor, exact: Tensor) -> float:
    """Return the RMS difference of logits (..., V), relative to their standard deviation."""
    spread = (exact - exact.mean(-1, keepdim=True)).square().mean().sqrt().clamp(min=1e-6)
    return float((ours - exact).square().mean().sqrt() / spread)


@torch.no_grad()
def plain_logits(
    model: Any,
    prompts: Sequence[Sequence[int]],
    dtype: torch.dtype,
) -> Tensor:
    """Return the logits (R, S, V) of each prompt's last positions, from one pass without a cache.

    The pass computes in `dtype`. Prompts are padded at their end, which no earlier position sees.
    """
    width = max(map(len, prompts))
    ids_RL = torch.tensor(
        [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=model.device
    )
    with in_precision(model, dtype):
        logits = model(input_ids=ids_RL, use_cache=False).logits
    return torch.stack(
        [row[len(p) - STEPS : len(p)].float() for row, p in zip(logits, prompts, strict=True)]
    )


@torch.no_grad()
def decoded_logits(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
) -> Tensor:
    """Return the same logits from a decoder, with the prompts' last tokens one by one.

    The first prompt is in two rows, one of which leaves after the first step, as complete answers
    do.
    """
    rows = [prompts[0], *prompts]
    batch, logits_RV = decoder.start([prompt[: 1 - STEPS] for prompt in rows], STEPS)
    logits = [logits_RV.float()[1:]]
    for step in range(1, STEPS):
        tokens_R = torch.tensor([prompt[step - STEPS] for prompt in rows], device=device)
        logits.append(batch.step(tokens_R).float()[-len(prompts) :].clone())
        if step == 1:
            batch.keep(list(range(1, len(rows))))
            rows = rows[1:]
    return torch.stack(logits, dim=1)


@contextmanager
def in_precision(
    model: nn.Module,
    dtype: torch.dtype,
) -> Iterator[None]:
    """Compute forward passes in `dtype` inside of this context.

    A layer's weights are cast before it runs and restored after it.
    """
    weights = [
        p
        for name, p in model.named_parameters()
        if p.is_floating_point() and not is_of_adapter(name)
    ]
    if all(weight.dtype == dtype for weight in weights):
        yield
        return
    with ExitStack() as stack:
        for module in _pieces(model):
            kept: list[tuple[nn.Parameter, Tensor]] = []
            stack.callback(_restore, kept)
            for hook in (
                module.register_forward_pre_hook(_caster(kept, dtype), with_kwargs=True),
                module.register_forward_hook(
                    lambda *_, kept=kept: _restore(kept), always_call=True
                ),
            ):
                stack.callback(hook.remove)
        yield


def _pieces(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules to cast at a time.

    A layer is cast as a whole, because some layers read the weights of their parts without calling
    them.
    """
    layers = {id(child) for m in model.modules() if isinstance(m, nn.ModuleList) for child in m}

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if id(module) in layers or next(module.parameters(recurse=False), None) is not None:
            yield module
            return
        for child in module.children():
            yield from walk(child)

    yield from walk(model)


def _caster(
    kept: list[tuple[nn.Parameter, Tensor]],
    dtype: torch.dtype,
) -> Any:
    def cast(
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.dtype != dtype:
                kept.append((parameter, parameter.data))
                parameter.data = parameter.data.to(dtype)
        return tuple(_cast_value(a, dtype) for a in args), {
            k: _cast_value(v, dtype) for k, v in kwargs.items()
        }

    return cast


def _cast_value(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(_cast_value(part, dtype) for part in value)
    return value


def _restore(kept: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, data in kept:
        parameter.data = data
    kept.clear()
