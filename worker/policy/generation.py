# ruff: noqa: N803, N806, N815 - tensors are named with their axes
"""Batched sampling with transformers' own forward: one prefill for each distinct prompt, its cache shared by G answers.

Works for every decoder that transformers can run with a cache. Rows that are done leave the batch. Deterministic for a
seed: each row and step has its own uniform number, drawn whether or not the row still lives, so that the answers do not
depend on when other rows finish.
"""

# B prompts, G group size, R = B x G rows (those still alive, where a step is meant), L prompt tokens, T new tokens,
# V vocabulary, K tokens that are left to choose from

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from worker import settings

_COMPACT_BELOW = 0.8
"""Rows are copied together once fewer than this share of the batch is alive: copying costs as much as some steps."""

_LARGEST_UNIFORM = 1 - 2**-20  # keeps u * total below total in float32


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row: `token_ids` (T,), `logprobs` (T,) of the policy at temperature 1, and whether it came to an end."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


@dataclass(slots=True)
class Prefix:
    """Prompts that went through the model once. Left-padded: the last position is every prompt's last token.

    `mask_BL` is 1 on real tokens, `lengths_B` counts them, `logits_BV` predict the first new token.
    """

    cache: DynamicCache
    mask_BL: Tensor
    lengths_B: Tensor
    logits_BV: Tensor

    def repeat(self, repeats: int) -> "Prefix":
        """The same prompts, each `repeats` times in a row. Uses up this object."""
        self.cache.batch_repeat_interleave(repeats)
        return Prefix(
            self.cache,
            self.mask_BL.repeat_interleave(repeats, 0),
            self.lengths_B.repeat_interleave(repeats, 0),
            self.logits_BV.repeat_interleave(repeats, 0),
        )


def prefill(model: Any, prompts: Sequence[Sequence[int]]) -> Prefix:
    """One forward pass over `prompts` (token ids, none empty). Differentiable where gradients are on."""
    width = max(len(p) for p in prompts)
    # The pad token's id does not matter: the mask hides it.
    ids_BL = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    lengths_B = torch.tensor([len(p) for p in prompts], device=model.device)
    mask_BL = (torch.arange(width, device=model.device) >= width - lengths_B[:, None]).long()
    cache = DynamicCache(config=model.config)
    out = model(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        position_ids=(mask_BL.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefix(cache, mask_BL, lengths_B, out.logits[:, -1])


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    generation: settings.Generation,
    seed: int,
    end_ids: Sequence[int],
    is_done: Callable[[list[int]], bool],
    may_be_done_V: Tensor,
) -> list[list[Sampled]]:
    """G = `generation.num_generations` answers for each prompt.

    A row ends with one of `end_ids` (kept in its tokens), when `is_done` says so of its tokens, or unfinished at
    max_completion_length. `is_done` is asked only after tokens that `may_be_done_V` marks.
    """
    if not prompts:
        return []
    G, T = generation.num_generations, generation.max_completion_length
    num_rows = len(prompts) * G
    device = model.device
    prefix = prefill(model, prompts).repeat(G)
    sampler = Sampler(generation, [p for p in prompts for _ in range(G)], prefix.logits_BV.shape[-1], device)
    # Drawn on the CPU: the same numbers on every device.
    uniform_TR = torch.rand((T, num_rows), generator=torch.Generator().manual_seed(seed)).to(device)
    uniform_TR.clamp_(max=_LARGEST_UNIFORM)
    is_end_V = torch.zeros(prefix.logits_BV.shape[-1], dtype=torch.bool, device=device)
    is_end_V[list(end_ids)] = True
    may_be_done_V = may_be_done_V.to(device)

    cache, width = prefix.cache, prefix.mask_BL.shape[1]
    _preallocate(cache, width + T)
    mask_RS = torch.cat([prefix.mask_BL, prefix.mask_BL.new_ones((num_rows, T))], dim=1)
    positions_R = prefix.lengths_B
    logits_RV = prefix.logits_BV
    rows = list(range(num_rows))  # row number of each line of the batch
    tokens: list[list[int]] = [[] for _ in rows]
    logprobs: list[list[float]] = [[] for _ in rows]
    alive = [True] * num_rows
    finished = [False] * num_rows

    for step in range(T):
        next_R, logprobs_R = sampler.choose(logits_RV, uniform_TR[step], rows)
        ends = is_end_V[next_R].tolist()
        asks = may_be_done_V[next_R].tolist()
        for row, token, logprob, end, ask in zip(rows, next_R.tolist(), logprobs_R.tolist(), ends, asks, strict=True):
            if not alive[row]:
                continue
            tokens[row].append(token)
            logprobs[row].append(logprob)
            if end or (ask and is_done(tokens[row])):
                alive[row], finished[row] = False, True
        living = [line for line, row in enumerate(rows) if alive[row]]
        if not living or step == T - 1:
            break
        if len(living) < _COMPACT_BELOW * len(rows):
            keep = torch.tensor(living, device=device)
            cache.batch_select_indices(keep)
            mask_RS, positions_R, next_R = mask_RS[keep], positions_R[keep], next_R[keep]
            rows = [rows[line] for line in living]
        out = model(
            input_ids=next_R[:, None],
            attention_mask=mask_RS[:, : width + step + 1],
            position_ids=positions_R[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits_RV = out.logits[:, -1]
        positions_R = positions_R + 1

    answers = [Sampled(tuple(t), tuple(p), f) for t, p, f in zip(tokens, logprobs, finished, strict=True)]
    return [answers[i : i + G] for i in range(0, num_rows, G)]


class Sampler:
    """Temperature, top-k, top-p, min-p and repetition penalty in transformers' meaning and order (GRPOConfig's too)."""

    def __init__(
        self, generation: settings.Generation, prompts: Sequence[Sequence[int]], num_tokens: int, device: torch.device
    ) -> None:
        self._generation = generation
        self._seen_RV: Tensor | None = None
        if generation.repetition_penalty != 1.0:
            self._seen_RV = torch.zeros((len(prompts), num_tokens), dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self._seen_RV[row, list(prompt)] = True

    def choose(self, logits_RV: Tensor, uniform_N: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
        """The next tokens (R,) and their log-probabilities (R,) at temperature 1, before any of the limits.

        `rows` says which of all N rows the R lines are; `uniform_N` in [0, 1) decides.
        """
        logits_RV = logits_RV.float()
        scores_RV = logits_RV
        index = torch.tensor(rows, device=logits_RV.device)
        if self._seen_RV is not None:
            penalty = self._generation.repetition_penalty
            penalised_RV = torch.where(scores_RV < 0, scores_RV * penalty, scores_RV / penalty)
            scores_RV = torch.where(self._seen_RV[index], penalised_RV, scores_RV)
        next_R = _pick(scores_RV / self._generation.temperature, self._generation, uniform_N[index])
        if self._seen_RV is not None:
            self._seen_RV[index, next_R] = True
        chosen_R = logits_RV.gather(1, next_R[:, None])[:, 0]
        return next_R, chosen_R - logits_RV.logsumexp(-1)


def _pick(scores_RV: Tensor, generation: settings.Generation, uniform_R: Tensor) -> Tensor:
    """Inverse transform sampling from softmax(scores) after the limits. Sorts only for top-p without top-k."""
    num_tokens = scores_RV.shape[-1]
    candidates_RK: Tensor | None = None
    if 0 < generation.top_k < num_tokens:
        scores_RV, candidates_RK = scores_RV.topk(generation.top_k)
    elif generation.top_p < 1:
        scores_RV, candidates_RK = scores_RV.sort(descending=True)
    probs_RK = scores_RV.softmax(-1)
    if generation.top_p < 1:
        # Sorted downwards here: a token stays while those before it sum to less than top_p; the first always does.
        before_RK = probs_RK.cumsum(-1) - probs_RK
        probs_RK = probs_RK.masked_fill(before_RK >= generation.top_p, 0.0)
    if generation.min_p:
        probs_RK = probs_RK.masked_fill(probs_RK < generation.min_p * probs_RK.amax(-1, keepdim=True), 0.0)
    cumulative_RK = probs_RK.cumsum(-1)
    picked_R1 = torch.searchsorted(cumulative_RK, uniform_R[:, None] * cumulative_RK[:, -1:], right=True)
    picked_R1 = picked_R1.clamp(max=cumulative_RK.shape[-1] - 1)
    return (picked_R1 if candidates_RK is None else candidates_RK.gather(1, picked_R1))[:, 0]


class _PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer with room for `capacity` tokens, so that a step writes one token instead of copying all."""

    def __init__(self, filled: DynamicLayer, capacity: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = filled.keys.dtype, filled.keys.device, True
        self._num_tokens = int(filled.keys.shape[-2])
        self.keys = self._with_room(filled.keys, capacity)
        self.values = self._with_room(filled.values, capacity)

    @staticmethod
    def _with_room(states: Tensor, capacity: int) -> Tensor:
        room = states.new_empty((*states.shape[:2], capacity, states.shape[-1]))
        room[:, :, : states.shape[-2]] = states
        return room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, end = self._num_tokens, self._num_tokens + key_states.shape[-2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self._num_tokens = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self._num_tokens


def _preallocate(cache: DynamicCache, capacity: int) -> None:
    # Sliding windows and the like keep transformers' own layers: they are bounded already.
    cache.layers = [
        _PreallocatedLayer(layer, capacity) if type(layer) is DynamicLayer and layer.is_initialized else layer
        for layer in cache.layers
    ]
