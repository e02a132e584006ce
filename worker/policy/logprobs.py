# ruff: noqa: N803, N806 - tensors are named with their axes
"""Log-probabilities of given completions under the policy: what the loss is made of.

A batch is one row: what its prompts begin with in common, the rest of each prompt, its completions,
each once and nothing padded (packed_attention.py).
The logits of all its tokens are never there at once. Models whose layers can't be packed are given
one sequence to a row; those of them that do more to their logits than we know make those of all
completions at once.
"""

# S tokens of the packed row, M completion tokens that are scored, N completions, T tokens of the
# longest, E size of the hidden states, V vocabulary

import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from worker.policy.head import token_logprobs
from worker.policy.packed_attention import PACKED, Layout

log = logging.getLogger(__name__)

_MAX_LOGITS = 1 << 26
"""Logits that are there at a time (256 MiB in float32). More of them are made twice: in the forward
pass, and, piece by piece, in the backward pass."""

_WORTH_SHARING = 16
"""Tokens that prompts have in common from which on these go through the model once."""

_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}

_SAME = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Limit on how far a packed log-probability may be from the plain one; what leaks from one sequence
to another is far more."""


class PromptGroup(NamedTuple):
    """A prompt and completions of it, as token ids. None is empty."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]


class Scorer:
    """Scores completions with `model`, inside `with scorer.passes():`, which the backward pass
    belongs into too.

    `recomputes` saves memory for time: layers are computed again in the backward pass (gradient
    checkpointing).
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.recomputes = False
        self.is_packed = _has_packable_layers(model)
        if self.is_packed:
            self.is_packed = self._is_exact(self._packed_hidden)
        self.has_plain_head = self.is_packed or (
            _has_own_head(model) and self._is_exact(self._padded_hidden)
        )
        if not self.is_packed:
            log.warning(
                "model is not packed, training takes one row for each completion type=%s pieces_of_logits=%s",
                type(model).__name__, self.has_plain_head,
            )  # fmt: skip

    def count_tokens(self, prompts: Collection[Sequence[int]], completions: Sequence[int]) -> int:
        """Return the tokens that go through the model, padding included, for these distinct prompts
        (token ids) and completions of these lengths."""
        if self.is_packed:
            shared = (len(prompts) - 1) * common_prefix(prompts)
            return sum(map(len, prompts)) - shared + sum(completions)
        return len(completions) * (max(map(len, prompts)) + max(completions))

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Forward and backward passes are made in here; generation is not."""
        config = self.model.config
        before = config._attn_implementation
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if self.is_packed:
            config._attn_implementation = PACKED
        if self.recomputes:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
            for layer in layers:  # only the layer itself: what is in it stays in evaluation mode
                layer.training = True
        try:
            yield
        finally:
            config._attn_implementation = before
            if self.recomputes:
                self.model.activation_checkpointing_disable()
                for layer in layers:
                    layer.training = False

    def logprobs(self, groups: Sequence[PromptGroup], temperature: float) -> Tensor:
        """Return (M,) log-probabilities at `temperature` of all completions' tokens, one completion
        after the other.

        float32. Differentiable where gradients are on.
        """
        return self.logprobs_and_entropies(groups, temperature)[0]

    def logprobs_and_entropies(
        self, groups: Sequence[PromptGroup], temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return `logprobs`, and (M,) the entropies of what the tokens were drawn from, without a
        gradient.

        None in their place: the model makes its logits in ways that only it knows.
        """
        if self.is_packed:
            return self._logprobs_of(*self._packed_hidden(groups), temperature)
        if self.has_plain_head:
            return self._logprobs_of(*self._padded_hidden(groups), temperature)
        return self._plain_logprobs(groups, temperature), None

    def _plain_logprobs(self, groups: Sequence[PromptGroup], temperature: float) -> Tensor:
        completions = [c for group in groups for c in group.completions]
        prompt_of = [i for i, group in enumerate(groups) for _ in group.completions]
        rows_NT = completion_logprobs(
            self.model, [g.prompt for g in groups], completions, prompt_of, temperature
        )
        return torch.cat([row_T[: len(c)] for row_T, c in zip(rows_NT, completions, strict=True)])

    def _packed_hidden(self, groups: Sequence[PromptGroup]) -> tuple[Tensor, Tensor]:
        """(M, E) hidden states that predict the completions' tokens, and (M,) these."""
        prefix = common_prefix([group.prompt for group in groups])
        ids, positions, predicting, predicted = _pack(groups, prefix)
        device = self.model.device
        layout = Layout(
            tuple(
                (len(group.prompt) - prefix, tuple(len(c) - 1 for c in group.completions))
                for group in groups
            ),
            prefix,
        )
        out = self.model.base_model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            layout=layout,
        )
        hidden_ME = out.last_hidden_state[0].index_select(
            0, torch.tensor(predicting, device=device)
        )
        return hidden_ME, torch.tensor(predicted, device=device)

    def _padded_hidden(self, groups: Sequence[PromptGroup]) -> tuple[Tensor, Tensor]:
        """The same from a row for each completion."""
        ids_NS, mask_NS, starts_N = _pad(
            [(g.prompt, c) for g in groups for c in g.completions], self.model.device
        )
        is_scored_NS = mask_NS & (
            torch.arange(ids_NS.shape[1], device=ids_NS.device) >= starts_N[:, None]
        )
        out = self.model.base_model(
            input_ids=ids_NS, attention_mask=mask_NS.long(), use_cache=False
        )
        return out.last_hidden_state[:, :-1][is_scored_NS[:, 1:]], ids_NS[is_scored_NS]

    def _logprobs_of(
        self, hidden_ME: Tensor, ids_M: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        num_rows = max(1, _MAX_LOGITS // self.model.config.get_text_config().vocab_size)
        if len(ids_M) <= num_rows:
            return self._head_logprobs(hidden_ME, ids_M, temperature)
        pieces = zip(torch.split(hidden_ME, num_rows), torch.split(ids_M, num_rows), strict=True)
        found = [
            checkpoint(
                self._head_logprobs,
                *piece,
                temperature,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for piece in pieces
        ]
        return torch.cat([logprobs for logprobs, _ in found]), torch.cat([e for _, e in found])

    def _head_logprobs(
        self, hidden_ME: Tensor, ids_M: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logits_MV = self.model.get_output_embeddings()(hidden_ME)
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        if softcap is not None:
            logits_MV = torch.tanh(logits_MV / softcap) * softcap
        return token_logprobs(logits_MV, ids_M, temperature)

    @torch.no_grad()
    def _is_exact(
        self, find_hidden: Callable[[Sequence[PromptGroup]], tuple[Tensor, Tensor]]
    ) -> bool:
        """Return whether a small batch has the same log-probabilities so and plain: families do
        things of their own."""
        high = self.model.config.get_text_config().vocab_size
        drawn = torch.randint(high, (32,), generator=torch.Generator().manual_seed(0)).tolist()
        prefix, ids = tuple(drawn[:_WORTH_SHARING]), tuple(drawn[_WORTH_SHARING:])
        groups = [
            PromptGroup(prefix + ids[:5], (ids[5:9], ids[9:11], ids[11:12])),
            PromptGroup(prefix + ids[12:14], (ids[3:6], ids[14:16])),
        ]
        with self.passes():
            found_M, _ = self._logprobs_of(*find_hidden(groups), 1.0)
        return bool(
            (found_M - self._plain_logprobs(groups, 1.0)).abs().max() < _SAME[self.model.dtype]
        )


def completion_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    prompt_of: Sequence[int],
    temperature: float,
) -> Tensor:
    """(N, T) log-probabilities of `completions` (token ids, none empty) at `temperature`, 0 where
    there is padding.

    Completion n answers `prompts[prompt_of[n]]`. The plain way, for any causal language model: a
    row holds one prompt and one completion, padded on the right. Differentiable where gradients are
    on. float32.
    """
    device = model.device
    ids_NS, mask_NS, starts_N = _pad(
        [(prompts[p], c) for p, c in zip(prompt_of, completions, strict=True)], device
    )
    width, longest = ids_NS.shape[1], max(len(c) for c in completions)
    # Prompts need no logits, which are most of the memory.
    takes_number = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = {"logits_to_keep": width - int(starts_N.min()) + 1} if takes_number else {}
    out = model(input_ids=ids_NS, attention_mask=mask_NS.long(), use_cache=False, **kept)
    num_left_out = width - out.logits.shape[1]
    scored_NT = starts_N[:, None] + torch.arange(longest, device=device)
    is_real_NT = scored_NT < mask_NS.sum(1, keepdim=True)
    scored_NT = scored_NT.clamp(max=width - 1)
    rows_N1 = torch.arange(len(ids_NS), device=device)[:, None]
    predicting_NTV = out.logits[rows_N1, scored_NT - 1 - num_left_out]
    logprobs_NT = _gather_logprobs(predicting_NTV, ids_NS[rows_N1, scored_NT], temperature)
    return torch.where(is_real_NT, logprobs_NT, 0.0)


def _pad(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts and completions in a row each, padded on the right: (N, S) ids, (N, S) which of them
    are real, (N,) where completions start."""
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    width = max(lengths)
    ids = [
        [*prompt, *completion] + [0] * (width - n)
        for (prompt, completion), n in zip(rows, lengths, strict=True)
    ]
    mask_NS = torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]
    return (
        torch.tensor(ids, device=device),
        mask_NS,
        torch.tensor([len(p) for p, _ in rows], device=device),
    )


def _has_own_head(model: Any) -> bool:
    """Return whether hidden states are to be had before the logits are made of them."""
    return model.base_model is not model and model.get_output_embeddings() is not None


def _has_packable_layers(model: Any) -> bool:
    return packing_obstacle(model) is None


def packing_obstacle(model: Any) -> str | None:
    """Return why a model's layers can't be packed, as its configuration says; None: they can,
    unless a trial fails."""
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if others := sorted(layer_types - _PACKABLE_LAYERS):
        return f"layers of type {', '.join(others)}"
    if not getattr(model, "_supports_attention_backend", False):
        return "attention of its own"
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return "attention sinks"
    return None


def takes(model: Any, argument: str) -> bool:
    """Return whether a model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def common_prefix(prompts: Collection[Sequence[int]]) -> int:
    """Return how many tokens several prompts begin with in common; each keeps one of its own.

    0 where it is not worth it: one prompt, or a few tokens.
    """
    if len(prompts) < 2:
        return 0
    ordered = sorted(tuple(prompt) for prompt in prompts)
    first, last = ordered[0], ordered[-1]  # all others lie between them
    limit = min(map(len, prompts)) - 1
    length = next((i for i in range(limit) if first[i] != last[i]), limit)
    return length if length >= _WORTH_SHARING else 0


def _pack(
    groups: Sequence[PromptGroup], prefix: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Token ids and positions of the row, which of its tokens predict the completions' tokens, and
    these. The first `prefix` tokens of all prompts stand in it once.

    A completion's last token is not in the row: it predicts nothing that is asked for.
    """
    ids = list(groups[0].prompt[:prefix])
    positions = list(range(prefix))
    predicting: list[int] = []
    predicted: list[int] = []
    for prompt, completions in groups:
        ids.extend(prompt[prefix:])
        positions.extend(range(prefix, len(prompt)))
        last = len(ids) - 1
        for completion in completions:
            predicting += [last, *range(len(ids), len(ids) + len(completion) - 1)]
            predicted.extend(completion)
            ids.extend(completion[:-1])
            positions.extend(range(len(prompt), len(prompt) + len(completion) - 1))
    return ids, positions, predicting, predicted


def _gather_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    logits = logits.float() / temperature
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)
