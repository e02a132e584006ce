# ruff: noqa: N803, N806, N815 - tensors are named with their axes
"""Decode with transformers' forward and cache, for every decoder that transformers can run.

Each distinct prompt goes through the model once, and its cache is repeated for its answers. The
lean decoder is faster and is used for the families that it implements.
"""

# B prompts, R rows, L prompt tokens, T new tokens, S tokens seen, V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


@dataclass(slots=True)
class Prefix:
    """Prompts after their forward pass, padded on the left, so that all end at the same position.

    `mask_BL` is 1 on real tokens, `lengths_B` counts them, `logits_BV` predict the first new token.
    """

    cache: DynamicCache
    mask_BL: Tensor
    lengths_B: Tensor
    logits_BV: Tensor

    def select(self, index_R: Tensor) -> "Prefix":
        """Return a row for each of these prompt numbers; this object can't be used afterwards."""
        # Every kind of layer has reorder_cache, also those with a convolutional or recurrent state.
        self.cache.reorder_cache(index_R)
        return Prefix(
            self.cache, self.mask_BL[index_R], self.lengths_B[index_R], self.logits_BV[index_R]
        )


def prefill(
    model: Any,
    prompts: Sequence[Sequence[int]],
) -> Prefix:
    """Run one forward pass over `prompts` (token ids, none empty).

    It is differentiable if gradients are enabled.
    """
    width = max(len(p) for p in prompts)
    # Any token id pads: the mask hides it.
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


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Bytes of a model's cache: `row` per row, whatever its length, and `token` per token.

    The former are states such as those of linear attention.
    """

    row: int
    token: int

    def of(self, num_rows: int, num_tokens: int) -> int:
        """Return the bytes of a batch."""
        return num_rows * (self.row + num_tokens * self.token)


@torch.no_grad()
def measure_cache(model: Any) -> CacheSize:
    """Measure the cache of `model` with two short prompts, since layers of a model may differ."""
    short, long = (_bytes_kept(model, length) for length in (1, 9))
    token = max(0, long - short) // 8
    return CacheSize(row=max(0, short - token), token=token)


def _bytes_kept(model: Any, length: int) -> int:
    out = model(torch.zeros((1, length), dtype=torch.long, device=model.device), use_cache=True)
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in _tensors_of(dict(out), "logits").values()
    )


def _tensors_of(value: Any, *left_out: str) -> dict[int, Tensor]:
    """Return all tensors in a model's output, including those inside caches, by address."""
    if isinstance(value, Tensor):
        return {value.data_ptr(): value}
    if isinstance(value, dict):
        parts = [part for name, part in value.items() if name not in left_out]
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif type(value).__module__.startswith("transformers."):  # a cache, or a layer of one
        parts = list(vars(value).values())
    else:
        parts = []
    return {address: tensor for part in parts for address, tensor in _tensors_of(part).items()}


class CachedDecoder:
    """Continues prompts with transformers' forward."""

    compact_below = 0.8

    def __init__(self, model: Any) -> None:
        self._model = model
        self._size: CacheSize | None = None
        self.name = f"transformers' forward, {model.dtype}"

    def start(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple["CachedBatch", Tensor]:
        """Return a batch with a row per prompt, and the logits (R, V) of the first tokens."""
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        index_R = torch.tensor(
            [number[tuple(prompt)] for prompt in prompts], device=self._model.device
        )
        prefix = prefill(self._model, list(number)).select(index_R)
        return CachedBatch(self._model, prefix, max_new_tokens), prefix.logits_BV

    def bytes_needed(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
    ) -> int:
        """Return an upper estimate of a batch's memory, in bytes.

        Every row includes the keys and values of its prompt, and all are copied when rows leave.
        """
        width = max(map(len, prompts))
        self._size = self._size or measure_cache(self._model)
        caches = 2 * self._size.of(len(prompts), width + max_new_tokens)
        logits = 5 * 4 * len(prompts) * self._model.get_output_embeddings().weight.shape[0]
        # Activations of a layer for all distinct prompts; an MLP is seldom more than four times as
        # wide as the hidden size.
        hidden = self._model.config.get_text_config().hidden_size
        prefill = 16 * hidden * self._model.dtype.itemsize * len(set(map(tuple, prompts))) * width
        return int(caches + logits + prefill)


class CachedBatch:
    """The answers in progress of a CachedDecoder."""

    def __init__(
        self,
        model: Any,
        prefix: Prefix,
        max_new_tokens: int,
    ) -> None:
        self._model = model
        self._cache = prefix.cache
        self._num_seen = prefix.mask_BL.shape[1]
        self._positions_R = prefix.lengths_B
        new_RT = prefix.mask_BL.new_ones((prefix.mask_BL.shape[0], max_new_tokens))
        self._mask_RS = torch.cat([prefix.mask_BL, new_RT], dim=1)
        _preallocate(self._cache, self._mask_RS.shape[1])

    def step(self, tokens_R: Tensor) -> Tensor:
        """Append one token to each row; return the logits (R, V) of the next ones."""
        self._num_seen += 1
        out = self._model(
            input_ids=tokens_R[:, None],
            attention_mask=self._mask_RS[:, : self._num_seen],
            position_ids=self._positions_R[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._positions_R = self._positions_R + 1
        logits_RV: Tensor = out.logits[:, -1]
        return logits_RV

    def keep(self, lines: Sequence[int]) -> None:
        """Keep only these lines of the batch, in this order."""
        index = torch.tensor(lines, device=self._positions_R.device)
        self._cache.reorder_cache(index)
        self._mask_RS, self._positions_R = self._mask_RS[index], self._positions_R[index]


class _PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer with room for `capacity` tokens, so that a step writes only the new token."""

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

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        start, end = self._num_tokens, self._num_tokens + key_states.shape[-2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self._num_tokens = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self._num_tokens


def _preallocate(cache: DynamicCache, capacity: int) -> None:
    # Layers with sliding windows and similar ones are bounded already and stay as they are.
    cache.layers = [
        _PreallocatedLayer(layer, capacity)
        if type(layer) is DynamicLayer and layer.is_initialized
        else layer
        for layer in cache.layers
    ]
