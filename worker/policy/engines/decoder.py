# ruff: noqa: N803, N806 - tensors are named with their axes
"""The lean decoder: the computation of transformers' forward in a quarter of its time.

Each distinct prompt goes through the model once, and the common prefix of all prompts goes through
it once for all of them. A prompt's keys and values are never copied; all its answers are rows of
one product with them. The keys and values of new tokens are in a separate cache, which is allocated
in advance.
"""

# P distinct prompts, L tokens of the longest, R rows (answers in progress), W most rows of a
# prompt, N prompt tokens, H query heads, K key heads, Q = H / K, D size of a head, T new tokens so
# far, V vocabulary

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.policy.engines import native
from worker.policy.engines.architecture import Layer, Norm, Weights
from worker.policy.engines.cuda_graph import Replay
from worker.policy.engines.native_step import Step
from worker.policy.logprobs import common_prefix

_PREFILL_TOKENS = 4096
"""Prompts go through the model in parts of about this many tokens, to limit the memory."""
_BLOCK = 16  # tokens whose keys are adjacent, as native.c reads them
_FIRST_ROOM = 128  # first capacity of the cache of new tokens; it doubles when it is full


class LeanDecoder:
    """Runs a model's decoder from its `Weights`.

    Raises UnknownArchitectureError for a model that it does not implement.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
    ) -> None:
        self.weights = Weights(model, dtype)
        self.replays = self.weights.device.type == "cuda"
        # A replayed step with fewer rows is hardly faster, and must be recorded again.
        self.compact_below = 0.5 if self.replays else 0.8
        has_native = self.weights.device.type == "cpu" and native.knows(
            self.weights.layers[0].activation
        )
        self.native: Any | None = native.load() if has_native else None
        self.lacks_native = has_native and self.native is None and native.wanted() != "none"

    @property
    def name(self) -> str:
        extra = " with CUDA graphs" if self.replays else ""
        if self.native:
            extra = " with native operations"
        return f"lean decoder{extra}, {self.weights.dtype}"

    def start(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple["LeanBatch", Tensor]:
        """Return a batch with a row per prompt, and the logits (R, V) of the first tokens."""
        self.weights.refresh()
        batch: LeanBatch
        if self.replays:
            batch = ReplayedBatch(self.weights, prompts, max_new_tokens)
        elif self.native is None:
            batch = LeanBatch(self.weights, prompts, max_new_tokens)
        elif not self.weights.are_panels:
            batch = NativeBatch(self.weights, prompts, max_new_tokens, self.native)
        else:
            batch = PanelBatch(self.weights, prompts, max_new_tokens, self.native)
        return batch, batch.logits_RV

    def bytes_needed(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
    ) -> int:
        """Return an upper estimate of a batch's memory, in bytes.

        Keys and values count twice, because they are copied when rows leave or the cache grows.
        Logits count five times, for the sampler.
        """
        weights = self.weights
        width, num_prompts = _padded(max(map(len, prompts))), len(set(map(tuple, prompts)))
        size = weights.activation_dtype.itemsize
        token = 2 * len(weights.layers) * weights.num_kv_heads * weights.head_dim * size
        caches = 2 * token * (num_prompts * width + len(prompts) * _padded(max_new_tokens))
        logits = 5 * 4 * len(prompts) * weights.num_tokens
        per_token = 4 * weights.mlp_size + 6 * weights.num_heads * weights.head_dim
        prefill = size * max(_PREFILL_TOKENS, width) * per_token
        return int(caches + logits + prefill)


class LeanBatch:
    """The answers in progress.

    `_prompt_of` has the number of each row's prompt; the caches have its new keys and values.
    """

    def __init__(
        self,
        weights: Weights,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
    ) -> None:
        self._weights = weights
        self._max_new_tokens = max_new_tokens
        self._step = 0
        distinct = list(dict.fromkeys(tuple(p) for p in prompts))
        number = {prompt: i for i, prompt in enumerate(distinct)}
        self._prompt_of = [number[tuple(prompt)] for prompt in prompts]
        self._lengths_P = [len(prompt) for prompt in distinct]
        width = _padded(max(self._lengths_P))
        self._rotations = weights.rotations(width + max_new_tokens)
        H, K, D, P = weights.num_heads, weights.num_kv_heads, weights.head_dim, len(distinct)
        self._dtype = weights.activation_dtype
        like = torch.empty(0, device=weights.device, dtype=self._dtype)
        self._prompt_keys = [self._new_keys(like, P, width) for _ in weights.layers]
        self._prompt_values = [like.new_zeros((P, K, width, D)) for _ in weights.layers]
        self._scale_H = torch.ones((H + K, 1), device=weights.device)
        self._scale_H[:H] = weights.scale

        last_PX = [self._prefill(distinct[a:b], a) for a, b in _parts(self._lengths_P)]
        logits_PV = self._logits(torch.cat(last_PX))
        self.logits_RV = logits_PV[torch.tensor(self._prompt_of, device=weights.device)]

        R = len(self._prompt_of)
        room = _padded(min(_FIRST_ROOM, max_new_tokens))
        self._keys = [self._new_keys(like, R, room) for _ in weights.layers]
        self._values = [like.new_zeros((R, K, room, D)) for _ in weights.layers]
        self._place_1 = torch.zeros(1, dtype=torch.long, device=weights.device)
        """Index of this step's keys and values in the cache: `_step`, as a tensor."""
        self._num_looked_at = 0
        """Number of new keys that attention reads; those after `_place_1` are masked."""
        self._arrange()

    def _new_keys(
        self,
        like: Tensor,
        count: int,
        width: int,
    ) -> Tensor:
        """Return a cache for `width` keys of each of `count` rows or prompts."""
        return like.new_zeros((count, self._weights.num_kv_heads, self._weights.head_dim, width))

    def _widen_keys(self, keys: Tensor, more: int) -> Tensor:
        return functional.pad(keys, (0, more))

    def _keep_prompt_keys(
        self,
        keys: Tensor,
        prompt: int,
        k_NKD: Tensor,
    ) -> None:
        keys[prompt, :, :, : len(k_NKD)] = k_NKD.permute(1, 2, 0)

    def step(self, tokens_R: Tensor) -> Tensor:
        """Append one token to each row; return the logits (R, V) of the next ones."""
        self._make_room()
        self._place_1.fill_(self._step)
        self._num_looked_at = self._step + 1
        logits_RV = self._compute(tokens_R)
        self._step += 1
        return logits_RV

    def _compute(self, tokens_R: Tensor) -> Tensor:
        positions_R = self._lengths_R + self._place_1
        turns = {
            name: table[positions_R][:, None] * self._scale_H
            for name, table in self._rotations.items()
        }
        masks = {
            window: self._mask(window)
            for window in {layer.window for layer in self._weights.layers}
        }
        x = self._weights.embed(tokens_R).to(self._dtype)
        for i, layer in enumerate(self._weights.layers):
            q, k, v = self._heads(layer, x, turns[layer.rope])
            x = self._finish_layer(layer, x, self._attend(i, q, k, v, masks[layer.window]))
        return self._logits(x)

    def keep(self, lines: Sequence[int]) -> None:
        """Keep only these lines of the batch, in this order, which must be ascending."""
        index = torch.tensor(lines, device=self._weights.device)
        self._keys = [keys.index_select(0, index) for keys in self._keys]
        self._values = [values.index_select(0, index) for values in self._values]
        self._prompt_of = [self._prompt_of[line] for line in lines]
        alive = sorted(set(self._prompt_of))
        if len(alive) < len(self._lengths_P):
            which = torch.tensor(alive, device=self._weights.device)
            self._prompt_keys = [keys.index_select(0, which) for keys in self._prompt_keys]
            self._prompt_values = [values.index_select(0, which) for values in self._prompt_values]
            self._lengths_P = [self._lengths_P[p] for p in alive]
            self._prompt_of = [alive.index(p) for p in self._prompt_of]
        self._arrange()

    def _arrange(self) -> None:
        """Arrange the rows as a grid with a line per prompt, for products with the prompts' keys.

        Shorter lines are padded by repeating their last row.
        """
        rows_P: list[list[int]] = [[] for _ in self._lengths_P]
        for row, prompt in enumerate(self._prompt_of):
            rows_P[prompt].append(row)
        self._grid = (len(rows_P), max(map(len, rows_P)))
        flat = [rows[min(i, len(rows) - 1)] for rows in rows_P for i in range(self._grid[1])]
        device = self._weights.device
        self._row_of_slot: Tensor | None = None
        self._slot_of_row: Tensor | None = None
        if flat != list(range(len(self._prompt_of))):
            slot = {
                row: rows_P[p].index(row) + p * self._grid[1]
                for row, p in enumerate(self._prompt_of)
            }
            self._row_of_slot = torch.tensor(flat, device=device)
            self._slot_of_row = torch.tensor([slot[row] for row in range(len(slot))], device=device)
        self._prompt_of_R = torch.tensor(self._prompt_of, device=device)
        self._lengths_R = torch.tensor([self._lengths_P[p] for p in self._prompt_of], device=device)

    def _make_room(self) -> None:
        room = self._values[0].shape[2]
        if self._step == room:
            more = _padded(min(room, self._max_new_tokens - room))
            self._keys = [self._widen_keys(keys, more) for keys in self._keys]
            self._values = [functional.pad(values, (0, 0, 0, more)) for values in self._values]

    def _hides_nothing(self, window: int | None) -> bool:
        width = self._prompt_values[0].shape[2]
        return min(self._lengths_P) == width and (window is None or width + self._step < window)

    def _mask(self, window: int | None) -> Tensor | None:
        """Return the mask (R, 1, 1, L + T) that is added to the scores; None: nothing is hidden."""
        if self._hides_nothing(window):
            return None
        width = self._prompt_values[0].shape[2]
        places = torch.arange(width + self._num_looked_at, device=self._weights.device)
        # A key's position within its row; padding is treated as a later position.
        lengths_R1 = self._lengths_R[:, None]
        now_R1 = lengths_R1 + self._place_1
        positions_RS = torch.where(places < width, places, places - width + lengths_R1)
        is_hidden_RS = ((places < width) & (places >= lengths_R1)) | (positions_RS > now_R1)
        if window is not None:
            is_hidden_RS |= positions_RS <= now_R1 - window
        mask_RS = torch.zeros(is_hidden_RS.shape, device=places.device, dtype=self._dtype)
        return mask_RS.masked_fill_(is_hidden_RS, -math.inf)[:, None, None]

    def _heads(
        self,
        layer: Layer,
        x: Tensor,
        turn: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scaled queries (n, H, D), keys and values (n, K, D) of n tokens.

        Queries and keys are rotated.
        """
        H, K, D = self._weights.num_heads, self._weights.num_kv_heads, self._weights.head_dim
        heads = layer.qkv(layer.attention_norm(x)).view(-1, H + 2 * K, D).float()
        rotated = heads[:, : H + K]
        if layer.head_norm is not None:
            rotated = layer.head_norm(rotated)
        pairs = torch.view_as_complex(rotated.reshape(*rotated.shape[:2], D // 2, 2))
        rotated = torch.view_as_real(pairs * turn).flatten(-2).to(self._dtype)
        return rotated[:, :H], rotated[:, H:], heads[:, H + K :].to(self._dtype)

    def _finish_layer(
        self,
        layer: Layer,
        x: Tensor,
        attended: Tensor,
    ) -> Tensor:
        out = layer.attention_out(attended)
        if layer.attention_post_norm is not None:
            out = layer.attention_post_norm(out)
        x = x + out
        gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, dim=-1)
        out = layer.down(layer.activation(gate).mul_(up))
        if layer.mlp_post_norm is not None:
            out = layer.mlp_post_norm(out)
        return x.add_(out)

    def _logits(self, x: Tensor) -> Tensor:
        return self._cap_logits(self._weights.head(self._weights.norm(x)).float())

    def _cap_logits(self, logits: Tensor) -> Tensor:
        cap = self._weights.logit_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _attend(
        self,
        index: int,
        q_RHD: Tensor,
        k_RKD: Tensor,
        v_RKD: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Store the new keys and values, and return the attention (R, H x D) of the new tokens.

        Scores with a prompt's keys are one product for all its rows, in the layout of `_arrange`;
        scores with a row's new keys are a product per row.
        """
        R, H, D = q_RHD.shape
        K = k_RKD.shape[1]
        Q, P = H // K, self._grid[0]
        prompt_keys, prompt_values = self._prompt_keys[index], self._prompt_values[index]
        keys, values, length = self._keys[index], self._values[index], self._num_looked_at
        keys.index_copy_(3, self._place_1, k_RKD[..., None])
        values.index_copy_(2, self._place_1, v_RKD[:, :, None])
        keys, values = keys.view(R * K, D, -1)[..., :length], values.view(R * K, -1, D)[:, :length]
        L = prompt_keys.shape[3]

        own = torch.bmm(q_RHD.reshape(R * K, Q, D), keys)
        shared = torch.bmm(self._to_grid(q_RHD.reshape(R, K, Q, D)), prompt_keys.view(P * K, D, L))
        scores = torch.cat([self._to_rows(shared, K), own.view(R, K, Q, length)], dim=-1)
        if self._weights.score_cap is not None:
            scores.div_(self._weights.score_cap).tanh_().mul_(self._weights.score_cap)
        if mask is not None:
            scores.add_(mask)
        shares = scores.softmax(-1)
        own = torch.bmm(shares[..., L:].reshape(R * K, Q, length), values)
        shared = torch.bmm(self._to_grid(shares[..., :L]), prompt_values.view(P * K, L, D))
        return self._to_rows(shared, K).add(own.view(R, K, Q, D)).reshape(R, H * D)

    def _to_grid(self, rows: Tensor) -> Tensor:
        """Rearrange (R, K, Q, n) to (P x K, W x Q, n)."""
        P, W = self._grid
        if self._row_of_slot is not None:
            rows = rows.index_select(0, self._row_of_slot)
        _, K, Q, n = rows.shape
        return rows.reshape(P, W, K, Q, n).transpose(1, 2).reshape(P * K, W * Q, n)

    def _to_rows(self, grid: Tensor, K: int) -> Tensor:
        """Rearrange (P x K, W x Q, n) to (R, K, Q, n)."""
        P, W = self._grid
        rows = grid.view(P, K, W, -1, grid.shape[-1]).transpose(1, 2).flatten(0, 1)
        return rows if self._slot_of_row is None else rows.index_select(0, self._slot_of_row)

    def _prefill(
        self,
        prompts: Sequence[Sequence[int]],
        first: int,
    ) -> Tensor:
        """Run the joined prompts without padding, and store their keys and values.

        Their common prefix runs once. Returns the hidden states (P, hidden) of the prompts' last
        tokens.
        """
        device = self._weights.device
        shared = common_prefix(prompts)
        pieces = [prompts[0][:shared], *(prompt[shared:] for prompt in prompts)]
        starts = [0, *(shared for _ in prompts)]
        sizes = [len(piece) for piece in pieces]
        positions_N = torch.cat(
            [torch.arange(start, start + n) for start, n in zip(starts, sizes, strict=True)]
        ).to(device)
        turns = {
            name: table[positions_N][:, None] * self._scale_H
            for name, table in self._rotations.items()
        }
        tokens_N = torch.tensor([token for piece in pieces for token in piece], device=device)
        x = self._weights.embed(tokens_N).to(self._dtype)
        for i, layer in enumerate(self._weights.layers):
            heads = self._heads(layer, x, turns[layer.rope])
            (prefix_q, *own_q), (prefix_k, *own_k), (prefix_v, *own_v) = (
                torch.split(part, sizes) for part in heads
            )
            attended = [self._attend_prompt(prefix_q, prefix_k, prefix_v, layer.window)]
            for prompt, (q, k, v) in enumerate(zip(own_q, own_k, own_v, strict=True), start=first):
                k, v = torch.cat([prefix_k, k]), torch.cat([prefix_v, v])
                self._keep_prompt_keys(self._prompt_keys[i], prompt, k)
                self._prompt_values[i][prompt, :, : len(v)] = v.transpose(0, 1)
                attended.append(self._attend_prompt(q, k, v, layer.window))
            x = self._finish_layer(layer, x, torch.cat(attended))
        last_P = torch.tensor(sizes, device=device).cumsum(0)[1:] - 1
        hidden: Tensor = x.index_select(0, last_P)
        return hidden

    def _attend_prompt(
        self,
        q_NHD: Tensor,
        k_SKD: Tensor,
        v_SKD: Tensor,
        window: int | None,
    ) -> Tensor:
        """Return causal attention (N, H x D) of the last N of a prompt's S tokens."""
        N, S = len(q_NHD), len(k_SKD)
        if N == 0:
            return q_NHD.flatten(1)
        q, k, v = (t.transpose(0, 1)[None] for t in (q_NHD, k_SKD, v_SKD))
        mask = None
        if N < S or (window is not None and window < S):
            mask = q.new_ones((N, S), dtype=torch.bool).tril(S - N)
            mask = mask if window is None else mask.triu(S - N + 1 - window)
        if self._weights.score_cap is None:
            out = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=1.0, enable_gqa=True
            )
        else:
            mask = q.new_ones((N, S), dtype=torch.bool).tril() if mask is None else mask
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
            scores = (q @ k.mT).div_(self._weights.score_cap).tanh_().mul_(self._weights.score_cap)
            out = scores.masked_fill_(~mask, -math.inf).softmax(-1) @ v
        return out[0].transpose(0, 1).flatten(1)


class ReplayedBatch(LeanBatch):
    """A batch on a GPU, with replayed steps.

    Attention reads the whole cache, because shapes must not change between steps.
    """

    _replay: Replay | None = None

    def step(self, tokens_R: Tensor) -> Tensor:
        self._make_room()
        if self._replay is None:
            self._replay = Replay(self._weights.device)
            self._tokens_R = torch.empty_like(tokens_R)
            self._num_looked_at = self._values[0].shape[2]
        self._tokens_R.copy_(tokens_R)
        self._place_1.fill_(self._step)
        self._step += 1
        return self._replay(lambda: self._compute(self._tokens_R))

    def _arrange(self) -> None:
        super()._arrange()
        self._replay = None

    def _make_room(self) -> None:
        if self._step == self._values[0].shape[2]:
            super()._make_room()
            self._replay = None

    def _hides_nothing(self, window: int | None) -> bool:
        return False  # the hidden keys differ from step to step


class NativeBatch(LeanBatch):
    """A batch on a CPU; the small operations between the products are in C."""

    def __init__(
        self,
        weights: Weights,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        functions: Any,
    ) -> None:
        super().__init__(weights, prompts, max_new_tokens)
        self._functions = functions

    def _new_keys(
        self,
        like: Tensor,
        count: int,
        width: int,
    ) -> Tensor:
        return like.new_zeros(
            (count, self._weights.num_kv_heads, width // _BLOCK, self._weights.head_dim, _BLOCK)
        )

    def _widen_keys(self, keys: Tensor, more: int) -> Tensor:
        return functional.pad(keys, (0, 0, 0, 0, 0, more // _BLOCK))

    def _keep_prompt_keys(
        self,
        keys: Tensor,
        prompt: int,
        k_NKD: Tensor,
    ) -> None:
        whole = functional.pad(k_NKD, (0, 0, 0, 0, 0, -len(k_NKD) % _BLOCK))
        blocks = whole.view(-1, _BLOCK, *whole.shape[1:]).permute(2, 0, 3, 1)
        keys[prompt, :, : blocks.shape[1]] = blocks

    def step(self, tokens_R: Tensor) -> Tensor:
        self._make_room()
        weights = self._weights
        R = len(tokens_R)
        positions_R = self._lengths_R + self._step
        turns = {
            name: torch.view_as_real(table.index_select(0, positions_R))
            for name, table in self._rotations.items()
        }
        x = weights.embed(tokens_R).float()
        normed = torch.empty_like(x)
        attended = x.new_empty((R, weights.num_heads * weights.head_dim))
        room = self._prompt_values[0].shape[2] + self._values[0].shape[2]
        scores = x.new_empty((R * weights.num_kv_heads, native.QUERIES, room))
        added: Tensor | None = None
        for i, layer in enumerate(weights.layers):
            self._add_norm(x, added, layer.attention_norm, normed)
            qkv = layer.qkv(normed)
            self._attend_natively(i, qkv, turns[layer.rope], scores, attended)
            added = layer.attention_out(attended)
            if layer.attention_post_norm is not None:
                added = layer.attention_post_norm(added)
            self._add_norm(x, added, layer.mlp_norm, normed)
            gate_up = layer.gate_up(normed)
            gated = x.new_empty((R, gate_up.shape[1] // 2))
            is_gelu = native.is_gelu(layer.activation)
            self._functions.gate(gate_up.data_ptr(), gated.data_ptr(), R, gated.shape[1], is_gelu)
            added = layer.down(gated)
            if layer.mlp_post_norm is not None:
                added = layer.mlp_post_norm(added)
        self._add_norm(x, added, weights.norm, normed)
        self._step += 1
        return self._cap_logits(weights.head(normed))

    def _add_norm(
        self,
        x: Tensor,
        added: Tensor | None,
        norm: Norm,
        out: Tensor,
    ) -> None:
        term = None if added is None else added.data_ptr()
        self._functions.add_norm(
            x.data_ptr(),
            term,
            norm.weight.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            x.shape[1],
            norm.eps,
        )

    def _attend_natively(
        self,
        index: int,
        qkv: Tensor,
        turn: Tensor,
        scores: Tensor,
        out: Tensor,
    ) -> None:
        weights, norm = self._weights, self._weights.layers[index].head_norm
        prompt_values = self._prompt_values[index]
        keys, values = self._keys[index], self._values[index]
        R, H, K = len(qkv), weights.num_heads, weights.num_kv_heads
        D, room = weights.head_dim, values.shape[2]
        self._functions.turn_heads(
            qkv.data_ptr(),
            turn.data_ptr(),
            None if norm is None else norm.weight.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            *(R, H, K, D, room, self._step),
            0.0 if norm is None else norm.eps,
            weights.scale,
        )
        self._functions.attend(
            qkv.data_ptr(),
            self._prompt_keys[index].data_ptr(),
            prompt_values.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            self._prompt_of_R.data_ptr(),
            self._lengths_R.data_ptr(),
            scores.data_ptr(),
            out.data_ptr(),
            *(
                R,
                H,
                K,
                D,
                prompt_values.shape[2],
                room,
                self._step,
                weights.layers[index].window or 0,
            ),
            weights.score_cap or 0.0,
        )


class PanelBatch(NativeBatch):
    """A batch whose products are all computed by products_*.c; a step is one call of step.c."""

    _described: Step | None = None

    def step(self, tokens_R: Tensor) -> Tensor:
        self._make_room()
        weights = self._weights
        if self._described is None:
            caches = zip(
                self._prompt_keys, self._prompt_values, self._keys, self._values, strict=True
            )
            self._described = Step(weights, len(tokens_R), list(caches))
        positions_R = self._lengths_R + self._step
        turns = {
            name: torch.view_as_real(table.index_select(0, positions_R))
            for name, table in self._rotations.items()
        }
        x = weights.embed(tokens_R).float()
        logits_RV = self._described.run(
            self._functions, x, turns, self._prompt_of_R, self._lengths_R, self._step
        )
        self._step += 1
        return self._cap_logits(logits_RV)

    def _arrange(self) -> None:
        super()._arrange()
        self._described = None

    def _make_room(self) -> None:
        if self._step == self._values[0].shape[2]:
            super()._make_room()
            self._described = None


def _padded(num_tokens: int) -> int:
    """Return a cache's capacity: a multiple of 64 tokens, as native.c requires."""
    return -(-num_tokens // 64) * 64


def _parts(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return bounds (a, b) of parts whose sum is at most _PREFILL_TOKENS, or of one element."""
    parts: list[tuple[int, int]] = []
    start = total = 0
    for i, length in enumerate(lengths):
        if i > start and total + length > _PREFILL_TOKENS:
            parts.append((start, i))
            start, total = i, 0
        total += length
    return [*parts, (start, len(lengths))]
