# ruff: noqa: N806 - tensors are named with their axes
"""The precision of a decoder: what it says of real prompts, next to what one plain forward pass
says in float32.

The plain pass has no cache and nothing before a prompt. Transformers' own pass in the decoder's
precision shows what that precision costs; a decoder may be off by somewhat more than that. Weights
are cast one layer at a time, so the check never has a second copy of the model.
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
"""What is asked where the environment's own questions are not at hand."""

STEPS = 4
"""Positions of a prompt that are compared: its last ones. What comes before them is read at
once."""
_LONGEST = (96, 32, 24)
"""Tokens of each prompt that are read, from its beginning: the check stays a few seconds on a slow
processor."""
_FLOOR = 1e-3
"""Difference between two ways to compute the same in float32, of the logits' spread."""


def shorten(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts that are compared: at most three, each of more than STEPS tokens, cut where they
    are long."""
    chosen = [list(prompt) for prompt in prompts if len(prompt) > STEPS][: len(_LONGEST)]
    return [prompt[:longest] for prompt, longest in zip(chosen, _LONGEST, strict=False)]


def arbitrary_prompts(num_tokens: int) -> list[list[int]]:
    """Prompts for a model without a tokenizer: token ids that mean nothing."""
    return [[(7 * i + 3) % num_tokens for i in range(length)] for length in (24, 13, 9)]


def allowed_error(theirs: float, factor: float) -> float:
    """Return how far a decoder may be from float32, where transformers' own pass in its precision
    is `theirs` away."""
    return factor * theirs + _FLOOR


def difference(ours: Tensor, exact: Tensor) -> float:
    """Return how far logits (..., V) are apart (root mean square, of their spread)."""
    spread = (exact - exact.mean(-1, keepdim=True)).square().mean().sqrt().clamp(min=1e-6)
    return float((ours - exact).square().mean().sqrt() / spread)


@torch.no_grad()
def plain_logits(model: Any, prompts: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    """(R, S, V) logits of the last positions of each prompt, computed in `dtype`: one pass, without
    a cache.

    Prompts are filled up behind their end, which no position before it sees.
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
    decoder: Decoder, prompts: Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    """The same from a decoder, which reads the prompts' beginnings and then gets their last tokens
    one by one.

    The first prompt is in two rows, one of which leaves after the first step, as answers do that
    are complete.
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
def in_precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, forward passes compute in `dtype`: a layer's weights are cast before it runs, and put
    back after it."""
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
            stack.callback(_put_back, kept)
            for hook in (
                module.register_forward_pre_hook(_caster(kept, dtype), with_kwargs=True),
                module.register_forward_hook(
                    lambda *_, kept=kept: _put_back(kept), always_call=True
                ),
            ):
                stack.callback(hook.remove)
        yield


def _pieces(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are cast at a time: a layer as a whole, for some read their parts' weights
    without a call."""
    layers = {id(child) for m in model.modules() if isinstance(m, nn.ModuleList) for child in m}

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if id(module) in layers or next(module.parameters(recurse=False), None) is not None:
            yield module
            return
        for child in module.children():
            yield from walk(child)

    yield from walk(model)


def _caster(kept: list[tuple[nn.Parameter, Tensor]], dtype: torch.dtype) -> Any:
    def cast(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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


def _put_back(kept: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, data in kept:
        parameter.data = data
    kept.clear()
