# ruff: noqa: N803, N806 - tensors are named with their axes
"""Generation engines: prompts in, G sampled answers each out, with the policy's own log-probabilities.

`TorchEngine` is ours: batched sampling over a decoder, `LeanDecoder` for the families that it knows, transformers' own
forward for others. `ReferenceEngine` is `model.generate`, what tests and benchmarks compare with.

Deterministic for a seed. In ours each row and step has its own uniform number, drawn whether or not the row still
lives, so that the answers do not depend on when other rows finish.
"""

# P prompts, G group size, R = P x G rows (those still in the batch, where a step is meant), N all of them,
# T new tokens, V vocabulary

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from worker import settings
from worker.policy import native
from worker.policy.architecture import UnknownArchitectureError
from worker.policy.cached import CachedDecoder
from worker.policy.decoder import LeanDecoder
from worker.policy.sampling import Sampler

log = logging.getLogger(__name__)

_COMPACT_BELOW = 0.8
"""Rows are copied together once fewer than this share of the batch is alive: copying costs as much as some steps."""
_LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""How far the lean decoder's logits may be from transformers' (root mean square, of their spread)."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row: `token_ids` (T,), `logprobs` (T,) of the policy at temperature 1, and whether it came to an end."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


@dataclass(frozen=True, slots=True)
class Ending:
    """When an answer is over: after one of `end_ids` (kept in its tokens), or when `is_done` says so of its tokens.

    `is_done` is asked only after tokens that `may_be_done` (one flag a token of the vocabulary) marks.
    """

    end_ids: frozenset[int]
    is_done: Callable[[list[int]], bool]
    may_be_done: Sequence[bool]

    def reached(self, tokens: list[int]) -> bool:
        last = tokens[-1]
        return last in self.end_ids or (self.may_be_done[last] and self.is_done(tokens))


class Batch(Protocol):
    """Answers under way."""

    def step(self, tokens_R: Tensor) -> Tensor:
        """Logits (R, V) after one more token for each row."""

    def keep(self, lines: Sequence[int]) -> None:
        """Only these lines of the batch go on, in this order, which rises."""


class Decoder(Protocol):
    def start(self, prompts: Sequence[Sequence[int]], repeats: int, max_new_tokens: int) -> tuple[Batch, Tensor]:
        """Rows for `repeats` answers to each prompt, and the logits (R, V) of their first tokens."""


class Engine(Protocol):
    def generate(
        self, prompts: Sequence[Sequence[int]], generation: settings.Generation, seed: int, ending: Ending
    ) -> list[list[Sampled]]:
        """G = `generation.num_generations` answers to each prompt (token ids, none empty).

        A row ends as `ending` says, or unfinished at max_completion_length.
        """


def load_engine(model: Any, generation: settings.Generation) -> Engine:
    """The engine that the settings name, for this model. It follows the model's weights."""
    if generation.engine == "transformers":
        return ReferenceEngine(model)
    return TorchEngine(model, generation.dtype)


class TorchEngine:
    """Ours. `decoder` is what it found fit for the model."""

    def __init__(self, model: Any, dtype: str = "auto") -> None:
        self.decoder: Decoder = _find_decoder(model, dtype)
        self._device = model.device

    def generate(
        self, prompts: Sequence[Sequence[int]], generation: settings.Generation, seed: int, ending: Ending
    ) -> list[list[Sampled]]:
        return sample(self.decoder, self._device, prompts, generation, seed, ending)


@torch.no_grad()
def sample(
    decoder: Decoder,
    device: torch.device,
    prompts: Sequence[Sequence[int]],
    generation: settings.Generation,
    seed: int,
    ending: Ending,
) -> list[list[Sampled]]:
    """G answers to each prompt from a decoder, as `Engine.generate` says."""
    if not prompts:
        return []
    G, T = generation.num_generations, generation.max_completion_length
    rows = list(range(len(prompts) * G))  # row number of each line of the batch
    # Drawn on the CPU: the same numbers on every device.
    uniform_TR = torch.rand((T, len(rows)), generator=torch.Generator().manual_seed(seed)).to(device)
    sampler = Sampler(generation, [p for p in prompts for _ in range(G)], device)
    batch, logits_RV = decoder.start(prompts, G, T)
    tokens: list[list[int]] = [[] for _ in rows]
    finished = [False] * len(rows)
    history: list[tuple[list[int], Tensor]] = []

    for step in range(T):
        next_R, logprobs_R = sampler.choose(logits_RV, uniform_TR[step])
        history.append((rows, logprobs_R))
        for row, token in zip(rows, next_R.tolist(), strict=True):
            if not finished[row]:
                tokens[row].append(token)
                finished[row] = ending.reached(tokens[row])
        living = [line for line, row in enumerate(rows) if not finished[row]]
        if not living or step == T - 1:
            break
        if len(living) < _COMPACT_BELOW * len(rows):
            lines = torch.tensor(living, device=device)
            batch.keep(living)
            sampler.keep(lines)
            next_R, uniform_TR = next_R[lines], uniform_TR[:, lines]
            rows = [rows[line] for line in living]
        logits_RV = batch.step(next_R)

    logprobs = _collect(history, [len(t) for t in tokens])
    answers = [Sampled(tuple(t), tuple(p), f) for t, p, f in zip(tokens, logprobs, finished, strict=True)]
    return [answers[i : i + G] for i in range(0, len(answers), G)]


def _collect(history: list[tuple[list[int], Tensor]], lengths_N: list[int]) -> list[list[float]]:
    """Each row's log-probabilities, as many as it has tokens. Fetched at the end: a GPU is waited for once a step."""
    logprobs: list[list[float]] = [[] for _ in lengths_N]
    for rows, logprobs_R in history:
        for row, logprob in zip(rows, logprobs_R.tolist(), strict=True):
            if len(logprobs[row]) < lengths_N[row]:
                logprobs[row].append(logprob)
    return logprobs


def _find_decoder(model: Any, dtype_name: str) -> Decoder:
    """The lean decoder if it knows the model and says what transformers says of it, else transformers' own forward."""
    dtype = _find_dtype(model, dtype_name)
    try:
        decoder = LeanDecoder(model, dtype)
    except UnknownArchitectureError as obstacle:
        log.info("lean decoder not used reason=%s", obstacle)
        return CachedDecoder(model)
    error = disagreement(decoder, CachedDecoder(model), model.get_output_embeddings().weight.shape[0], model.device)
    if not error <= _LARGEST_ERROR[dtype]:
        log.warning(
            "lean decoder not used reason=disagreement family=%s error=%.2g allowed=%.2g; generation is slower",
            model.config.model_type,
            error,
            _LARGEST_ERROR[dtype],
        )
        return CachedDecoder(model)
    return decoder


@torch.no_grad()
def disagreement(ours: Decoder, theirs: Decoder, num_tokens: int, device: torch.device) -> float:
    """How far two decoders' logits are apart (root mean square, of their spread) over prompts and steps."""
    prompts = [[(7 * i + 3) % num_tokens for i in range(n)] for n in (24, 9)]
    batches = [decoder.start(prompts, 2, 4) for decoder in (ours, theirs)]
    outputs: list[list[Tensor]] = [[logits_RV.float()] for _, logits_RV in batches]
    for step in range(3):
        tokens_R = torch.tensor([(11 * step + 5 * r) % num_tokens for r in range(4)], device=device)
        for (batch, _), logits in zip(batches, outputs, strict=True):
            logits.append(batch.step(tokens_R).float())
    a, b = (torch.stack(logits) for logits in outputs)
    return float((a - b).square().mean().sqrt() / (b - b.mean(-1, keepdim=True)).square().mean().sqrt().clamp(min=1e-6))


def _find_dtype(model: Any, name: str) -> torch.dtype:
    """auto: on a CPU bfloat16 where that is fast (AMX; or AVX-512, with our own operations); else the model's own."""
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    if model.device.type == "cpu":
        has_vectors = torch.backends.cpu.get_cpu_capability() == "AVX512"
        if torch.cpu._is_amx_tile_supported() or (has_vectors and native.load() is not None):
            return torch.bfloat16
    dtype: torch.dtype = model.dtype
    return dtype


class ReferenceEngine:
    """`model.generate` of transformers, all answers in one batch. Its random numbers are torch's own: another stream
    than ours, so sampled answers differ, and depend on the batch; greedy ones don't."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], generation: settings.Generation, seed: int, ending: Ending
    ) -> list[list[Sampled]]:
        if not prompts:
            return []
        device, width, G = self._model.device, max(map(len, prompts)), generation.num_generations
        ids_PL = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        lengths_P = torch.tensor([len(p) for p in prompts], device=device)
        mask_PL = (torch.arange(width, device=device) >= width - lengths_P[:, None]).long()
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            out = self._model.generate(
                ids_PL,
                attention_mask=mask_PL,
                generation_config=_generation_config(generation, ending),
                stopping_criteria=StoppingCriteriaList([_AnswerDone(ending, width)]),
            )
        logits_TNV = torch.stack(out.logits).float()
        new_NT = out.sequences[:, width:]
        logprobs_NT = (logits_TNV.gather(2, new_NT.t()[..., None])[..., 0] - logits_TNV.logsumexp(-1)).t()
        rows = [_cut(t, p, ending) for t, p in zip(new_NT.tolist(), logprobs_NT.tolist(), strict=True)]
        return [rows[i : i + G] for i in range(0, len(rows), G)]


def _generation_config(generation: settings.Generation, ending: Ending) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        num_return_sequences=generation.num_generations,
        max_new_tokens=generation.max_completion_length,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
        eos_token_id=sorted(ending.end_ids),
        pad_token_id=min(ending.end_ids, default=0),
        output_logits=True,
        return_dict_in_generate=True,
    )


class _AnswerDone(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, ending: Ending, width: int) -> None:
        self._ending = ending
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = [self._ending.reached(row) for row in input_ids[:, self._width :].tolist()]
        return torch.tensor(done, device=input_ids.device)


def _cut(tokens: list[int], logprobs: list[float], ending: Ending) -> Sampled:
    """A row up to its end; `generate` fills it up with pad tokens."""
    for length in range(1, len(tokens) + 1):
        if ending.reached(tokens[:length]):
            return Sampled(tuple(tokens[:length]), tuple(logprobs[:length]), finished=True)
    return Sampled(tuple(tokens), tuple(logprobs), finished=False)
