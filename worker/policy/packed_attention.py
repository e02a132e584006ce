# ruff: noqa: N803, N806 - tensors are named with their axes
"""Attention over a packed row: the prompts' common prefix, then each prompt with its completions.

The common prefix and the rest of each prompt are in the row once; the row is not padded. A prompt's
token attends to the prompt's tokens before it; a completion's token attends to its prompt and to
the tokens before it in the same completion.

The function is registered with transformers' AttentionInterface, so every model family that uses
this interface can be packed.
"""

# S tokens of the row, P of the common prefix, L of the rest of a prompt, C completions of a prompt,
# T tokens of the longest of them, H heads, K key heads, R = H / K, D head size

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from worker.policy import prompt_attention

PACKED = "hivewright-packed"
"""Name of this attention in a model's configuration.

transformers does not build a mask for an attention that it does not know.
"""


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a packed row, in tokens.

    `prefix` is the length P of the prompts' common prefix, 0 without one. `groups` contains, for
    each prompt, the length L of its rest and the lengths of its completions in the row.
    """

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    prefix: int = 0
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """The lengths of all pieces of the row, in order."""
        sizes = [size for prompt, completions in self.groups for size in (prompt, *completions)]
        return [self.prefix, *sizes]

    def mask(
        self,
        before: int,
        length: int,
        window: int | None,
        device: torch.device,
    ) -> Tensor:
        """Return the mask (length, before + length), True for the keys that a token attends to.

        These are its own key and the keys before it, at most `window` in total; None: all of them.
        """
        key = (before, length, window)
        if key not in self._masks:
            query_T1 = torch.arange(before, before + length, device=device)[:, None]
            other_S = torch.arange(before + length, device=device)
            mask_TS = other_S <= query_T1
            if window is not None:
                mask_TS = mask_TS & (query_T1 - other_S < window)
            self._masks[key] = mask_TS
        return self._masks[key]


def attend(
    module: torch.nn.Module,
    query_1HSD: Tensor,
    key_1KSD: Tensor,
    value_1KSD: Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the attention output (1, S, H, D), and None for the weights, as transformers expects.

    `scaling` None: 1 / sqrt(D). `sliding_window` None: no window. `softcap` None: scores are not
    capped. Dropout is never used. Other arguments of a model family are ignored, because `Scorer`
    does not pack a model for which they make a difference.
    """
    scale = query_1HSD.shape[-1] ** -0.5 if scaling is None else scaling
    queries, keys, values = (
        iter(torch.split(x[0].transpose(0, 1), layout.sizes))
        for x in (query_1HSD, key_1KSD, value_1KSD)
    )
    prefix_q, prefix_k, prefix_v = next(queries), next(keys), next(values)
    whole = _Group(layout, 0, scale, sliding_window, softcap)
    outputs: list[Tensor] = []
    if layout.prefix:
        outputs.append(whole.attend(prefix_q[None], prefix_k[None], prefix_v[None], None, None)[0])
    behind_prefix = _Group(layout, layout.prefix, scale, sliding_window, softcap)
    for length, lengths in layout.groups:
        prompt_q, prompt_k, prompt_v = next(queries), next(keys), next(values)
        if layout.prefix:
            (out_LHD,) = behind_prefix.attend(
                prompt_q[None], prompt_k[None], prompt_v[None], prefix_k, prefix_v
            )
            prompt_k = torch.cat([prefix_k, prompt_k])
            prompt_v = torch.cat([prefix_v, prompt_v])
        else:
            (out_LHD,) = whole.attend(prompt_q[None], prompt_k[None], prompt_v[None], None, None)
        outputs.append(out_LHD)
        completions = _Group(layout, layout.prefix + length, scale, sliding_window, softcap)
        for run in _runs(lengths, query_1HSD.device):
            # Padding on the right is never attended to; it is needed only within a run.
            q_CTHD, k_CTKD, v_CTKD = (
                _stack([next(x) for _ in run]) for x in (queries, keys, values)
            )
            if q_CTHD.shape[1] > 0:
                out_CTHD = completions.attend(q_CTHD, k_CTKD, v_CTKD, prompt_k, prompt_v)
                outputs.extend(
                    out_THD[:n] for out_THD, n in zip(out_CTHD.unbind(), run, strict=True)
                )
    return torch.cat(outputs)[None], None


@dataclass(frozen=True, slots=True)
class _Group:
    """Attention of rows (C, T, heads, D) that share `before` keys and values of their prompt."""

    layout: Layout
    before: int
    scale: float
    window: int | None
    softcap: float | None

    def attend(
        self,
        q_CTHD: Tensor,
        k_CTKD: Tensor,
        v_CTKD: Tensor,
        prompt_k: Tensor | None,
        prompt_v: Tensor | None,
    ) -> Tensor:
        """Return the attention output (C, T, H, D).

        `prompt_k` and `prompt_v` are (before, K, D); None if `before` is 0.
        """
        if self.softcap is not None:  # not supported by torch's fused kernel
            return self._dense(q_CTHD, k_CTKD, v_CTKD, prompt_k, prompt_v, self.softcap)
        # The fused CPU kernel takes keys and values of one size only; DeepSeek's differ.
        has_own_backward = q_CTHD.device.type == "cpu" and k_CTKD.shape[-1] == v_CTKD.shape[-1]
        if prompt_k is not None and prompt_v is not None and has_own_backward:
            mask_TS = self.layout.mask(self.before, q_CTHD.shape[1], self.window, q_CTHD.device)
            return prompt_attention.attend(
                q_CTHD, k_CTKD, v_CTKD, prompt_k, prompt_v, mask_TS, self.scale
            )
        return self._fused(q_CTHD, k_CTKD, v_CTKD, prompt_k, prompt_v)

    def _fused(
        self,
        q_CTHD: Tensor,
        k_CTKD: Tensor,
        v_CTKD: Tensor,
        prompt_k: Tensor | None,
        prompt_v: Tensor | None,
    ) -> Tensor:
        num_rows, length = q_CTHD.shape[:2]
        if prompt_k is not None and prompt_v is not None:
            k_CTKD = torch.cat([prompt_k.expand(num_rows, -1, -1, -1), k_CTKD], dim=1)
            v_CTKD = torch.cat([prompt_v.expand(num_rows, -1, -1, -1), v_CTKD], dim=1)
        repeats = q_CTHD.shape[2] // k_CTKD.shape[2]
        is_plain = self.before == 0 and (self.window is None or length <= self.window)
        mask = None
        if not is_plain:
            mask = self.layout.mask(self.before, length, self.window, q_CTHD.device)
        out_CHTD = F.scaled_dot_product_attention(
            q_CTHD.transpose(1, 2),
            k_CTKD.repeat_interleave(repeats, 2).transpose(1, 2),
            v_CTKD.repeat_interleave(repeats, 2).transpose(1, 2),
            attn_mask=mask,
            is_causal=is_plain,
            scale=self.scale,
        )
        return out_CHTD.transpose(1, 2)

    def _dense(
        self,
        q_CTHD: Tensor,
        k_CTKD: Tensor,
        v_CTKD: Tensor,
        prompt_k: Tensor | None,
        prompt_v: Tensor | None,
        softcap: float,
    ) -> Tensor:
        num_rows, length, num_heads, size = q_CTHD.shape
        num_keys = k_CTKD.shape[2]
        # A single product with the prompt's keys covers all rows and all heads that share them.
        q_HCTD = (q_CTHD * self.scale).permute(2, 0, 1, 3)
        q_KRCTD = q_HCTD.reshape(num_keys, -1, num_rows, length, size)
        scores = q_KRCTD @ k_CTKD.permute(2, 0, 3, 1)[:, None]
        if prompt_k is not None:
            shared = q_KRCTD.reshape(num_keys, -1, size) @ prompt_k.permute(1, 2, 0)
            scores = torch.cat([shared.view(*scores.shape[:-1], self.before), scores], dim=-1)
        scores = torch.tanh(scores / softcap) * softcap
        mask = self.layout.mask(self.before, length, self.window, q_CTHD.device)
        scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(q_CTHD.dtype)
        out_KRCTD = weights[..., self.before :] @ v_CTKD.permute(2, 0, 1, 3)[:, None]
        if prompt_v is not None:
            of_prompt = weights[..., : self.before].reshape(num_keys, -1, self.before)
            shared = of_prompt @ prompt_v.transpose(0, 1)
            out_KRCTD = out_KRCTD + shared.view_as(out_KRCTD)
        return out_KRCTD.reshape(num_heads, num_rows, length, size).permute(1, 2, 0, 3)


def _runs(
    lengths: tuple[int, ...],
    device: torch.device,
) -> list[list[int]]:
    """Split the lengths of one prompt's completions into runs that are computed together.

    On a CPU a run has completions of similar length, because padding costs time there; on other
    devices there is one run.
    """
    if device.type != "cpu":
        return [list(lengths)]
    runs: list[list[int]] = []
    for length in lengths:
        if runs and 0.75 * length <= runs[-1][0] <= 1.33 * length:
            runs[-1].append(length)
        else:
            runs.append([length])
    return runs


def _stack(pieces: Sequence[Tensor]) -> Tensor:
    if all(piece.shape[0] == pieces[0].shape[0] for piece in pieces):
        return torch.stack(list(pieces))
    return pad_sequence(list(pieces), batch_first=True)


AttentionInterface.register(PACKED, attend)
