# ruff: noqa: N806 - tensors are named with their axes
"""`model.generate` of transformers as an engine: the reference of tests and benchmarks."""

# P prompts, R rows, L prompt tokens, T new tokens, V vocabulary

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from worker import settings
from worker.policy.engines.batching import Rows
from worker.policy.engines.engine import Ending, Sampled, Setback
from worker.policy.engines.hf_decoder import CacheSize, measure_cache


class ReferenceEngine:
    """Generates with `model.generate`.

    Its random numbers are torch's, so sampled answers differ from those of our engine and depend on
    the batch. Greedy answers are the same.
    """

    def __init__(
        self,
        model: Any,
        rows: Rows | None = None,
        setbacks: Sequence[Setback] = (),
    ) -> None:
        self.setbacks = setbacks
        self.name = f"transformers' generate, {model.dtype}"
        self._model = model
        self._rows = rows or Rows(model.device)
        self._size: CacheSize | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        generation: settings.Generation,
        seed: int,
        ending: Ending,
    ) -> list[list[Sampled]]:
        G, T = generation.num_generations, generation.max_completion_length
        prompts_R = [prompt for prompt in prompts for _ in range(G)]
        num_logits = self._model.get_output_embeddings().weight.shape[0]
        size = self._size = self._size or measure_cache(self._model)

        def needed(piece: range) -> int:
            width = max(len(prompts_R[row]) for row in piece) + T
            return int(2 * size.of(len(piece), width) + 8 * len(piece) * T * num_logits)

        def make(piece: range) -> list[Sampled]:
            return self._generate(
                [prompts_R[row] for row in piece], generation, seed + piece.start, ending
            )

        rows = self._rows.run(len(prompts_R), needed, make)
        return [rows[i : i + G] for i in range(0, len(rows), G)]

    @torch.no_grad()
    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        generation: settings.Generation,
        seed: int,
        ending: Ending,
    ) -> list[Sampled]:
        device, width = self._model.device, max(map(len, prompts))
        ids_RL = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        lengths_R = torch.tensor([len(p) for p in prompts], device=device)
        mask_RL = (torch.arange(width, device=device) >= width - lengths_R[:, None]).long()
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), _without_own_config(self._model):
            torch.manual_seed(seed)
            out = self._model.generate(
                ids_RL,
                attention_mask=mask_RL,
                generation_config=_generation_config(generation, ending),
                stopping_criteria=StoppingCriteriaList([_AnswerDone(ending, width)]),
            )
        logits_TRV = torch.stack(out.logits).float() / generation.temperature
        new_RT = out.sequences[:, width:]
        logprobs_RT = (
            logits_TRV.gather(2, new_RT.t()[..., None])[..., 0] - logits_TRV.logsumexp(-1)
        ).t()
        return [
            cut(t, p, ending) for t, p in zip(new_RT.tolist(), logprobs_RT.tolist(), strict=True)
        ]


@contextmanager
def _without_own_config(model: Any) -> Iterator[None]:
    """Replace the model's generation config by an empty one inside this context.

    Otherwise transformers would use its values for the options that our settings leave out (min_p,
    no_repeat_ngram_size).
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def cut(
    tokens: list[int],
    logprobs: list[float],
    ending: Ending,
) -> Sampled:
    """Return a row up to the end of its answer, without the pad tokens after it."""
    for length in range(1, len(tokens) + 1):
        if ending.reached(tokens[:length]):
            return Sampled(tuple(tokens[:length]), tuple(logprobs[:length]), finished=True)
    return Sampled(tuple(tokens), tuple(logprobs), finished=False)


def _generation_config(generation: settings.Generation, ending: Ending) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        max_new_tokens=generation.max_completion_length,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
        eos_token_id=sorted(ending.end_ids),
        pad_token_id=min(ending.end_ids, default=0),
        output_logits=True,
        # Non-finite weights still generate; the log-probabilities of the raw logits reveal them.
        remove_invalid_values=True,
        return_dict_in_generate=True,
    )


class _AnswerDone(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, ending: Ending, width: int) -> None:
        self._ending = ending
        self._width = width

    def __call__(
        self,
        input_ids: Tensor,
        scores: Any,
        **kwargs: Any,
    ) -> Tensor:
        done = [self._ending.reached(row) for row in input_ids[:, self._width :].tolist()]
        return torch.tensor(done, device=input_ids.device)
