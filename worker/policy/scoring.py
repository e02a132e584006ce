# ruff: noqa: N803, N806 - tensors are named with their axes
"""Log-probabilities of given completions under the policy: what the loss is made of.

A prompt goes through the model once for all its completions, whose cache carries the gradient back; completions are
padded on the right among themselves only.
"""

# P prompts, N completions, L prompt tokens, T completion tokens, V vocabulary

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from worker.policy.generation import prefill


def completion_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    prompt_of: Sequence[int],
    temperature: float,
) -> Tensor:
    """(N, T) log-probabilities of `completions` (token ids, none empty) at `temperature`, 0 where there is padding.

    Completion n answers `prompts[prompt_of[n]]`. Differentiable where gradients are on. float32.
    """
    device = model.device
    width = max(len(c) for c in completions)
    ids_NT = torch.tensor([list(c) + [0] * (width - len(c)) for c in completions], device=device)
    lengths_N = torch.tensor([len(c) for c in completions], device=device)
    mask_NT = torch.arange(width, device=device) < lengths_N[:, None]

    prefix = prefill(model, prompts)
    source_N = torch.tensor(prompt_of, device=device)
    prefix.cache.batch_select_indices(source_N)
    logits_N1V = prefix.logits_BV[source_N][:, None]
    if width == 1:
        return _gather_logprobs(logits_N1V, ids_NT, temperature) * mask_NT
    # The last token predicts nothing that is asked for.
    out = model(
        input_ids=ids_NT[:, :-1],
        attention_mask=torch.cat([prefix.mask_BL[source_N], mask_NT[:, :-1].long()], dim=1),
        position_ids=prefix.lengths_B[source_N][:, None] + torch.arange(width - 1, device=device),
        past_key_values=prefix.cache,
        use_cache=True,
    )
    logits_NTV = torch.cat([logits_N1V, out.logits], dim=1)
    return _gather_logprobs(logits_NTV, ids_NT, temperature) * mask_NT


def _gather_logprobs(logits_NTV: Tensor, ids_NT: Tensor, temperature: float) -> Tensor:
    logits_NTV = logits_NTV.float() / temperature
    return logits_NTV.gather(-1, ids_NT[..., None])[..., 0] - logits_NTV.logsumexp(-1)
