# ruff: noqa: N803, N806 - tensors are named with their axes
"""Our generation engine: batched sampling over a decoder, `LeanDecoder` for the families that it knows, transformers'
own forward for others.

Deterministic for a seed. Each row and step has its own uniform number, drawn whether or not the row still lives, so
that the answers do not depend on when other rows finish, nor on which rows are generated together.
"""

# R rows (those still in the batch, where a step is meant), N all of them, T new tokens, V vocabulary

import gc
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from worker import settings
from worker.errors import ModelError
from worker.policy import memory, native, vllm
from worker.policy.architecture import UnknownArchitectureError
from worker.policy.cached import CachedDecoder
from worker.policy.decoder import LeanDecoder
from worker.policy.engine import Decoder, Ending, Engine, Sampled
from worker.policy.reference import ReferenceEngine
from worker.policy.rows import Rows
from worker.policy.sampling import Sampler
from worker.policy.vllm import VllmEngine

log = logging.getLogger(__name__)

_LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""How far the lean decoder's logits may be from transformers' (root mean square, of their spread)."""


def load_engine(model: Any, generation: settings.Generation, rows: Rows | None = None) -> Engine:
    """The engine that the settings name, for this model. It follows the model's weights.

    Raises ModelError for a vLLM that is asked for and can't be had.

    `rows` is how many answers it generates at once; None: it finds out for itself.
    """
    if generation.engine == "transformers":
        return ReferenceEngine(model, rows)
    if generation.engine == "vllm":
        return VllmEngine(model, generation)
    if generation.engine == "auto" and model.device.type == "cuda" and vllm.is_installed():
        try:
            return VllmEngine(model, generation)
        except ModelError as error:
            log.warning("vllm not used reason=%s", error)
        gc.collect()  # what it has taken of the GPU so far
        memory.release(model.device)
    return TorchEngine(model, generation.dtype, rows)


class TorchEngine:
    """Ours. `decoder` is what it found fit for the model."""

    def __init__(self, model: Any, dtype: str = "auto", rows: Rows | None = None) -> None:
        self.decoder: Decoder = _find_decoder(model, dtype)
        self._device = model.device
        self._rows = rows or Rows(model.device)

    @property
    def name(self) -> str:
        return f"torch, {self.decoder.name}"

    def generate(
        self, prompts: Sequence[Sequence[int]], generation: settings.Generation, seed: int, ending: Ending
    ) -> list[list[Sampled]]:
        G, T = generation.num_generations, generation.max_completion_length
        prompts_R = [prompt for prompt in prompts for _ in range(G)]
        # Drawn on the CPU: the same numbers on every device.
        uniform_TR = torch.rand((T, len(prompts_R)), generator=torch.Generator().manual_seed(seed))

        def needed(piece: range) -> int:
            return self.decoder.bytes_needed([prompts_R[row] for row in piece], T)

        def make(piece: range) -> list[Sampled]:
            numbers = uniform_TR[:, piece.start : piece.stop].to(self._device)
            return sample(self.decoder, [prompts_R[row] for row in piece], generation, numbers, ending)

        rows = self._rows.run(len(prompts_R), needed, make)
        return [rows[i : i + G] for i in range(0, len(rows), G)]


@torch.no_grad()
def sample(
    decoder: Decoder,
    prompts_R: Sequence[Sequence[int]],
    generation: settings.Generation,
    uniform_TR: Tensor,
    ending: Ending,
) -> list[Sampled]:
    """An answer to each prompt. `uniform_TR` in [0, 1), on the model's device, decides which."""
    device = uniform_TR.device
    rows = list(range(len(prompts_R)))  # row number of each line of the batch
    sampler = Sampler(generation, prompts_R, device)
    batch, logits_RV = decoder.start(prompts_R, len(uniform_TR))
    tokens: list[list[int]] = [[] for _ in rows]
    finished = [False] * len(rows)
    history: list[tuple[list[int], Tensor]] = []

    for step in range(len(uniform_TR)):
        next_R, logprobs_R = sampler.choose(logits_RV, uniform_TR[step])
        history.append((rows, logprobs_R))
        for row, token in zip(rows, next_R.tolist(), strict=True):
            if not finished[row]:
                tokens[row].append(token)
                finished[row] = ending.reached(tokens[row])
        living = [line for line, row in enumerate(rows) if not finished[row]]
        if not living or step == len(uniform_TR) - 1:
            break
        if len(living) < decoder.compact_below * len(rows):
            lines = torch.tensor(living, device=device)
            batch.keep(living)
            sampler.keep(lines)
            next_R, uniform_TR = next_R[lines], uniform_TR[:, lines]
            rows = [rows[line] for line in living]
        logits_RV = batch.step(next_R)

    logprobs = _collect(history, [len(t) for t in tokens])
    return [Sampled(tuple(t), tuple(p), f) for t, p, f in zip(tokens, logprobs, finished, strict=True)]


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
    prompts = [[(7 * i + 3) % num_tokens for i in range(n)] for n in (24, 24, 9, 9)]
    batches = [decoder.start(prompts, 4) for decoder in (ours, theirs)]
    outputs: list[list[Tensor]] = [[logits_RV.float()] for _, logits_RV in batches]
    for step in range(3):
        tokens_R = torch.tensor([(11 * step + 5 * r) % num_tokens for r in range(4)], device=device)
        for (batch, _), logits in zip(batches, outputs, strict=True):
            logits.append(batch.step(tokens_R).float())
    a, b = (torch.stack(logits) for logits in outputs)
    return float((a - b).square().mean().sqrt() / (b - b.mean(-1, keepdim=True)).square().mean().sqrt().clamp(min=1e-6))


def _find_dtype(model: Any, name: str) -> torch.dtype:
    """auto: on a CPU bfloat16 where that is fast (AMX; or AVX2, with our own operations); else the model's own."""
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    if model.device.type == "cpu":
        has_vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        if torch.cpu._is_amx_tile_supported() or (has_vectors and native.load() is not None):
            return torch.bfloat16
    dtype: torch.dtype = model.dtype
    return dtype
