# ruff: noqa: N803, N806 - tensors are named with their axes
"""Compute log-probabilities of given completions under the policy, for the loss.

A batch is packed into one row without padding: the common prefix of its prompts once, then the rest
of each prompt and its completions (packed_attention.py). Logits are computed in pieces, to limit
their memory. Models whose layers can't be packed get one padded row per completion. If such a model
also computes its logits in an unknown way, the logits of all completions are computed at once.
"""

# S tokens of a row, M scored completion tokens, N completions, T tokens of the longest completion,
# E size of the hidden states, V vocabulary

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
"""Largest number of logits at a time (256 MiB in float32).

More are computed in pieces, which are computed again in the backward pass.
"""

_WORTH_SHARING = 16
"""Shortest common prefix of prompts, in tokens, that is computed only once."""

_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}

_SAME = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Largest accepted difference between log-probabilities of the packed and the plain computation.

If sequences could see each other, the difference would be far larger.
"""


class PromptGroup(NamedTuple):
    """The token ids of a prompt and of its completions, all of them non-empty."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]


class Scorer:
    """Compute log-probabilities of completions with `model`.

    Forward and backward passes must be inside `with scorer.passes():`. `recomputes` turns on
    gradient checkpointing: layers are computed again in the backward pass, to save memory.
    `is_packed`: a batch is one packed row. `has_plain_head`: logits are the output layer's, so they
    can be computed in pieces.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.recomputes = False
        self.is_packed = packing_obstacle(model) is None
        if self.is_packed:
            self.is_packed = self._is_exact(self._packed_hidden)
        self.has_plain_head = self.is_packed
        if not self.is_packed:
            self.has_plain_head = _has_own_head(model) and self._is_exact(self._padded_hidden)
            log.warning(
                "model is not packed, training takes one row for each completion"
                " type=%s pieces_of_logits=%s",
                type(model).__name__,
                self.has_plain_head,
            )

    def count_tokens(
        self,
        prompts: Collection[Sequence[int]],
        completions: Sequence[int],
    ) -> int:
        """Return the number of tokens of a batch in the model, including padding.

        `prompts` are the token ids of the distinct prompts, `completions` the completions' lengths.
        """
        if self.is_packed:
            shared = (len(prompts) - 1) * common_prefix(prompts)
            return sum(map(len, prompts)) - shared + sum(completions)
        return len(completions) * (max(map(len, prompts)) + max(completions))

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Set the model up for forward and backward passes, and restore it at the end."""
        config = self.model.config
        before = config._attn_implementation
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if self.is_packed:
            config._attn_implementation = PACKED
        if self.recomputes:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
            for layer in layers:  # not its submodules, which stay in evaluation mode (no dropout)
                layer.training = True
        try:
            yield
        finally:
            config._attn_implementation = before
            if self.recomputes:
                self.model.activation_checkpointing_disable()
                for layer in layers:
                    layer.training = False

    def logprobs(
        self,
        groups: Sequence[PromptGroup],
        temperature: float,
    ) -> Tensor:
        """Return the log-probabilities (M,) of the completions' tokens at `temperature`.

        The completions are concatenated. The result is float32, and differentiable if gradients are
        enabled.
        """
        return self.logprobs_and_entropies(groups, temperature)[0]

    def logprobs_and_entropies(
        self, groups: Sequence[PromptGroup], temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return `logprobs`, and the entropies (M,) of the tokens' distributions without gradient.

        The entropies are None if the model computes its logits in an unknown way.
        """
        if self.is_packed:
            return self._logprobs_of(*self._packed_hidden(groups), temperature)
        if self.has_plain_head:
            return self._logprobs_of(*self._padded_hidden(groups), temperature)
        return self._plain_logprobs(groups, temperature), None

    def _plain_logprobs(
        self,
        groups: Sequence[PromptGroup],
        temperature: float,
    ) -> Tensor:
        completions = [c for group in groups for c in group.completions]
        prompt_of = [i for i, group in enumerate(groups) for _ in group.completions]
        rows_NT = completion_logprobs(
            self.model, [g.prompt for g in groups], completions, prompt_of, temperature
        )
        return torch.cat([row_T[: len(c)] for row_T, c in zip(rows_NT, completions, strict=True)])

    def _packed_hidden(
        self,
        groups: Sequence[PromptGroup],
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states (M, E) that predict the scored tokens, and these tokens (M,)."""
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

    def _padded_hidden(
        self,
        groups: Sequence[PromptGroup],
    ) -> tuple[Tensor, Tensor]:
        """Return the same as `_packed_hidden`, computed with a padded row per completion."""
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
        """Return whether `find_hidden` gives the log-probabilities of the plain computation.

        It is tried with a small batch of random tokens, because a model family may have additional
        steps that are not known here.
        """
        high = self.model.config.get_text_config().vocab_size
        drawn = torch.randint(high, (32,), generator=torch.Generator().manual_seed(0)).tolist()
        prefix, ids = tuple(drawn[:_WORTH_SHARING]), tuple(drawn[_WORTH_SHARING:])
        groups = [
            PromptGroup(prefix + ids[:5], (ids[5:9], ids[9:11], ids[11:12])),
            PromptGroup(prefix + ids[12:14], (ids[3:6], ids[14:16])),
        ]
        with self.passes():
            found_M, _ = self._logprobs_of(*find_hidden(groups), 1.0)
        error = (found_M - self._plain_logprobs(groups, 1.0)).abs().max()
        return bool(error < _SAME[self.model.dtype])


def completion_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    prompt_of: Sequence[int],
    temperature: float,
) -> Tensor:
    """Return the log-probabilities (N, T) of `completions` at `temperature`, 0 on padding.

    Completion n, which must not be empty, follows `prompts[prompt_of[n]]`. This is the plain
    computation for any causal language model: a row has one prompt and one completion, padded on
    the right. The result is float32, and differentiable if gradients are enabled.
    """
    device = model.device
    ids_NS, mask_NS, starts_N = _pad(
        [(prompts[p], c) for p, c in zip(prompt_of, completions, strict=True)], device
    )
    width, longest = ids_NS.shape[1], max(len(c) for c in completions)
    # Logits take most of the memory, and prompts do not need them.
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
    """Pad rows of prompt and completion on the right.

    Returns token ids (N, S), a mask (N, S) that is False on padding, and the index (N,) of each
    completion's first token.
    """
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
    """Return whether the model has hidden states and a separate output layer."""
    return model.base_model is not model and model.get_output_embeddings() is not None


def packing_obstacle(model: Any) -> str | None:
    """Return the reason in a model's configuration why it can't be packed; None if there is none.

    Without such a reason, `Scorer` tries whether packing is exact.
    """
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
    """Return whether the model's `forward` has an argument with this name."""
    return argument in inspect.signature(model.forward).parameters


def common_prefix(prompts: Collection[Sequence[int]]) -> int:
    """Return the length of the prompts' common prefix; each prompt has at least one token after it.

    0 for a single prompt, or if the prefix is shorter than _WORTH_SHARING.
    """
    if len(prompts) < 2:
        return 0
    ordered = sorted(tuple(prompt) for prompt in prompts)
    first, last = ordered[0], ordered[-1]  # sorted: all prompts have the prefix of these two
    limit = min(map(len, prompts)) - 1
    length = next((i for i in range(limit) if first[i] != last[i]), limit)
    return length if length >= _WORTH_SHARING else 0


def _pack(
    groups: Sequence[PromptGroup], prefix: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return a packed row: token ids (S,), positions (S,), predicting (M,) and predicted (M,).

    `predicting` are the indices in the row of the tokens that predict completion tokens,
    `predicted` the ids of these completion tokens. The first `prefix` tokens, which all prompts
    share, are in the row once. A completion's last token is not in the row, because it does not
    predict a scored token.
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


def _gather_logprobs(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
) -> Tensor:
    logits = logits.float() / temperature
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)
