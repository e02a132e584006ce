# ruff: noqa: N803, N806 - tensors are named with their axes
"""Our generation engine: batched sampling with a decoder.

The decoder is `LeanDecoder` for the families that it implements, otherwise transformers' forward.
Sampling is deterministic for a seed. Each row and step has its own uniform random number, even
after the row is complete, so answers depend neither on when other rows finish nor on which rows are
generated together.
"""

# R rows (in a step, those still in the batch), N all rows, T new tokens, V vocabulary

import gc
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from worker import settings
from worker.errors import ModelError
from worker.policy import memory
from worker.policy.engines import decoder_check, native, vllm
from worker.policy.engines.architecture import (
    BOTH_DIRECTIONS,
    UnknownArchitectureError,
    find_obstacle,
)
from worker.policy.engines.batching import Rows
from worker.policy.engines.decoder import LeanDecoder
from worker.policy.engines.engine import Decoder, Ending, Engine, Sampled, Setback
from worker.policy.engines.hf_decoder import CachedDecoder
from worker.policy.engines.sampling import Sampler
from worker.policy.engines.transformers_engine import ReferenceEngine
from worker.policy.engines.vllm import VllmEngine

log = logging.getLogger(__name__)

_WORSE_THAN_THEIRS = 1.5
"""Largest distance of the lean decoder from float32, relative to that of transformers' pass in the
same precision."""
_WORSE_IS_WRONG = 4.0
"""The same for transformers' forward with a cache. This limit is larger, because there is no
further decoder to try, and the error of an incorrect cache is much larger."""

Prompts = Sequence[Sequence[int]]


def load_engine(
    model: Any,
    generation: settings.Generation,
    rows: Rows | None = None,
    prompts: Prompts = (),
) -> Engine:
    """Return the engine that the settings name for this model; it follows the model's weights.

    `rows` limits the answers that are generated at once; None: a limit of its own. Our engine is
    checked with `prompts`; if there are none, with arbitrary tokens.

    Raises ModelError if vLLM is required but unavailable, or if our engine computes the model
    incorrectly.
    """
    if generation.engine == "transformers":
        wanted = model.dtype if generation.dtype == "auto" else find_dtype(model, generation.dtype)
        return ReferenceEngine(
            model, rows, _unfollowed(wanted, model.dtype, "transformers' generate")
        )
    if generation.engine == "vllm":
        return VllmEngine(model, generation)
    setbacks: tuple[Setback, ...] = ()
    if generation.engine == "auto" and model.device.type == "cuda" and vllm.is_installed():
        try:
            return VllmEngine(model, generation)
        except ModelError as error:
            log.warning("vllm not used reason=%s", error)
            setbacks = (Setback("engine", f"vllm is installed but not used: {error}"),)
        gc.collect()  # frees the GPU memory of the failed start
        memory.release(model.device)
    return TorchEngine(model, generation.dtype, rows, prompts, setbacks)


class TorchEngine:
    """Our engine; `decoder` is the one that passed the check for the model."""

    def __init__(
        self,
        model: Any,
        dtype: str = "auto",
        rows: Rows | None = None,
        prompts: Prompts = (),
        setbacks: Sequence[Setback] = (),
    ) -> None:
        wanted, self.setbacks = find_dtype(model, dtype), [*setbacks]
        self.decoder: Decoder = _find_decoder(model, wanted, prompts, self.setbacks)
        if dtype != "auto" or self.setbacks:
            actual = (
                self.decoder.weights.dtype if isinstance(self.decoder, LeanDecoder) else model.dtype
            )
            self.setbacks += _unfollowed(wanted, actual, self.decoder.name)
        if isinstance(self.decoder, LeanDecoder) and self.decoder.lacks_native:
            self.setbacks.append(
                Setback("engine", f"native operations not used: {native.why_not()}")
            )
        self._device = model.device
        self._rows = rows or Rows(model.device)

    @property
    def name(self) -> str:
        return f"torch, {self.decoder.name}"

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        generation: settings.Generation,
        seed: int,
        ending: Ending,
    ) -> list[list[Sampled]]:
        G, T = generation.num_generations, generation.max_completion_length
        prompts_R = [prompt for prompt in prompts for _ in range(G)]
        # Drawn on the CPU, so that every device gets the same numbers.
        uniform_TR = torch.rand((T, len(prompts_R)), generator=torch.Generator().manual_seed(seed))

        def needed(piece: range) -> int:
            return self.decoder.bytes_needed([prompts_R[row] for row in piece], T)

        def make(piece: range) -> list[Sampled]:
            numbers = uniform_TR[:, piece.start : piece.stop].to(self._device)
            return sample(
                self.decoder, [prompts_R[row] for row in piece], generation, numbers, ending
            )

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
    """Return an answer to each prompt, drawn with `uniform_TR` in [0, 1) on the model's device."""
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
    return [
        Sampled(tuple(t), tuple(p), f) for t, p, f in zip(tokens, logprobs, finished, strict=True)
    ]


def _collect(
    history: list[tuple[list[int], Tensor]],
    lengths_N: list[int],
) -> list[list[float]]:
    """Return each row's log-probabilities, one per token.

    They are fetched at the end, because each fetch during the steps would wait for the GPU.
    """
    logprobs: list[list[float]] = [[] for _ in lengths_N]
    for rows, logprobs_R in history:
        for row, logprob in zip(rows, logprobs_R.tolist(), strict=True):
            if len(logprobs[row]) < lengths_N[row]:
                logprobs[row].append(logprob)
    return logprobs


def _unfollowed(
    wanted: torch.dtype,
    actual: torch.dtype,
    engine: str,
) -> list[Setback]:
    """Return the setback of an engine that computes in another type; empty if in the wanted one."""
    if wanted == actual:
        return []
    reason = f"{wanted} is wanted (generation.dtype), {engine} computes in {actual}"
    log.warning("engine computes in another precision reason=%s", reason)
    return [Setback("precision", reason)]


def _find_decoder(
    model: Any,
    dtype: torch.dtype,
    prompts: Prompts,
    setbacks: list[Setback],
) -> Decoder:
    """Return the first decoder that computes the model correctly.

    It tries the lean decoder in `dtype`, then in float32, then transformers' forward. Failures are
    added to `setbacks`. Raises ModelError if all fail.
    """
    obstacle = find_obstacle(model)
    if obstacle == BOTH_DIRECTIONS:
        raise ModelError(
            f"model of type {model.config.model_type}: {BOTH_DIRECTIONS}: a token also sees later"
            " ones, so it can't be sampled; take a causal language model"
            " (use_bidirectional_attention off in config.json)"
        )
    if obstacle:
        log.info("lean decoder not used reason=%s", obstacle)
    trial = _Trial(model, prompts)
    if not trial.can_be_judged:
        log.warning(
            "engine not checked reason=the model's logits are not finite family=%s",
            model.config.model_type,
        )
        setbacks.append(Setback("engine", "not checked: the model's logits are not finite"))
        return CachedDecoder(model)
    for wanted in () if obstacle else dict.fromkeys((dtype, torch.float32)):
        decoder = _try_lean(model, wanted, trial, setbacks)
        if decoder is not None:
            return decoder
    return _require_cached(model, trial)


class _Trial:
    """The reference for decoders: prompts, and their logits by plain forward passes in float32."""

    def __init__(self, model: Any, prompts: Prompts) -> None:
        self._model = model
        num_tokens = int(model.get_output_embeddings().weight.shape[0])
        self._prompts = decoder_check.shorten(prompts) or decoder_check.arbitrary_prompts(
            num_tokens
        )
        self._exact = decoder_check.plain_logits(model, self._prompts, torch.float32)
        self.can_be_judged = bool(self._exact.isfinite().all())
        self._theirs: dict[torch.dtype, float] = {torch.float32: 0.0}

    def judge(
        self,
        decoder: Decoder,
        dtype: torch.dtype,
        factor: float,
    ) -> tuple[float, float]:
        """Return the decoder's distance from float32, and the largest accepted one in `dtype`."""
        logits = decoder_check.decoded_logits(decoder, self._prompts, self._model.device)
        error = decoder_check.difference(logits, self._exact)
        if dtype not in self._theirs:
            theirs = decoder_check.plain_logits(self._model, self._prompts, dtype)
            self._theirs[dtype] = decoder_check.difference(theirs, self._exact)
        return error, decoder_check.allowed_error(self._theirs[dtype], factor)


def _try_lean(
    model: Any,
    dtype: torch.dtype,
    trial: _Trial,
    setbacks: list[Setback],
) -> LeanDecoder | None:
    """Return the lean decoder if it fits into memory and passes the check.

    Otherwise the reason is logged and added to `setbacks`.
    """
    needed, free = model.num_parameters() * dtype.itemsize, memory.free(model.device)
    if dtype != model.dtype and needed > free:
        log.warning(
            "lean decoder not tried dtype=%s"
            " reason=its copy of the weights takes %d MiB, %d MiB are free",
            dtype,
            needed >> 20,
            free >> 20,
        )
        setbacks.append(_not_lean(dtype, f"{needed >> 20} MiB are needed, {free >> 20} MiB free"))
        return None
    try:
        decoder = LeanDecoder(model, dtype)
        error, allowed = trial.judge(decoder, dtype, _WORSE_THAN_THEIRS)
    except UnknownArchitectureError as obstacle:
        log.info("lean decoder not used reason=%s", obstacle)
        return None
    if error <= allowed:
        log.info("lean decoder checked dtype=%s error=%.2g allowed=%.2g", dtype, error, allowed)
        return decoder
    log.warning(
        "lean decoder not used reason=disagreement family=%s dtype=%s error=%.2g allowed=%.2g",
        model.config.model_type,
        dtype,
        error,
        allowed,
    )
    setbacks.append(_not_lean(dtype, f"its error is {error:.2g}, {allowed:.2g} is allowed"))
    return None


def _not_lean(dtype: torch.dtype, reason: str) -> Setback:
    return Setback("engine", f"the lean decoder in {dtype} is not used: {reason}")


def _require_cached(model: Any, trial: _Trial) -> CachedDecoder:
    """Return transformers' forward with a cache; raise ModelError if it disagrees with one pass."""
    decoder = CachedDecoder(model)
    try:
        error, allowed = trial.judge(decoder, model.dtype, _WORSE_IS_WRONG)
    except Exception as failure:
        reason = memory.reason_of(failure)
        if memory.is_out_of_memory(failure):
            raise ModelError(
                f"model of type {model.config.model_type}: not even the check with four short"
                f" prompts fits into memory ({reason}); free memory, or take a smaller model"
            ) from failure
        raise _refusal(model, f"fails: {type(failure).__name__}: {reason}") from failure
    if not error <= allowed:
        raise _refusal(
            model, f"is {error:.2g} off one pass without a cache, {allowed:.2g} is allowed"
        )
    return decoder


def _refusal(model: Any, reason: str) -> ModelError:
    return ModelError(
        f"model of type {model.config.model_type} ({type(model).__name__}): transformers' forward"
        f" with a cache {reason}; its answers would not be the model's. Set generation.engine to"
        " transformers, which generates with the model's own cache, slower, or take a model of"
        " a family in docs/models.md"
    )


def find_dtype(model: Any, name: str) -> torch.dtype:
    """Return the type that `generation.dtype` names.

    auto: bfloat16 on a CPU that computes it fast (AMX; or AVX2, with our own operations), otherwise
    the model's type.
    """
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    dtype: torch.dtype = model.dtype
    if model.device.type == "cpu" and has_fast_bfloat16():
        dtype = torch.bfloat16
    return dtype


def has_fast_bfloat16() -> bool:
    """Return whether this CPU multiplies with 16-bit weights faster than with float32 ones."""
    has_vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return torch.cpu._is_amx_tile_supported() or (has_vectors and native.load() is not None)
