# ruff: noqa: N806 - tensors are named with their axes
"""vLLM as a generation engine, in this process and on the model's own GPU, where it is installed.

It is given the model's configuration only. Its weights are ours: brought over when it starts and
whenever they have changed since, adapters merged in; the keys and values that it keeps of prompts
are then thrown away. It never sees a tokenizer: prompts are token ids, and an answer is ended from
here, by the rule that all engines share.

vLLM applies min-p before top-p, transformers after it: with both set its nucleus is a little
smaller.
"""

import copy
import importlib.util
import itertools
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from worker import settings
from worker.errors import ModelError
from worker.policy import lora, memory
from worker.policy.engines.architecture import fingerprint
from worker.policy.engines.engine import Ending, Sampled, Setback
from worker.policy.logprobs import completion_logprobs

log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, or its weights would be out of reach
    "VLLM_CONFIGURE_LOGGING": "0",  # its lines go where ours go
    "VLLM_NO_USAGE_STATS": "1",  # it would report to its makers
}
"""vLLM has no other way to say these."""

_UNFIT = (
    ValueError,
    RuntimeError,
    AssertionError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
)
"""What it raises of a model, a machine or a version that does not fit: it has no class of its own
for that."""

_LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Limit on how far its log-probabilities may be from those that we train on, on average."""


def is_installed() -> bool:
    """Return whether there is a vLLM to try."""
    return importlib.util.find_spec("vllm") is not None


class VllmEngine:
    """Raises ModelError where vLLM can't run this model here, or says other things of it than
    transformers."""

    def __init__(self, model: Any, generation: settings.Generation) -> None:
        os.environ.update(_ENVIRONMENT)
        try:
            import vllm
        except (
            ImportError,
            OSError,
            RuntimeError,
        ) as error:  # RuntimeError: built for another torch
            raise ModelError(
                f"generation.engine: vllm: can't be imported: {memory.reason_of(error)}; expected"
                f" vLLM, built for torch {torch.__version__}, in this environment, or engine: torch"
            ) from error
        self._model = model
        self._dtype = (
            model.dtype if generation.dtype == "auto" else getattr(torch, generation.dtype)
        )
        self._numbers = itertools.count()
        self._sampling_params: Any = vllm.SamplingParams
        self._is_untied = model.device.type == "cpu"
        self._seen: list[int] | None = None
        self.setbacks: tuple[Setback, ...] = ()
        self.name = f"vllm {vllm.__version__}, {self._dtype}"
        try:
            self._llm: Any = _start(vllm.LLM, model, self._dtype, generation)
            self._require_agreement(generation)
        except _UNFIT as error:
            raise ModelError(
                f"generation.engine: {self.name} can't run this {model.config.model_type} here:"
                f" {memory.reason_of(error)}; change generation.vllm_memory if it says that memory"
                " is short, or set generation.engine: torch"
            ) from error

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        generation: settings.Generation,
        seed: int,
        ending: Ending,
    ) -> list[list[Sampled]]:
        G = generation.num_generations
        with _own_random_numbers(self._model.device):
            self._bring_weights()
            # The answers to a prompt follow each other: they find its keys and values in vLLM's
            # cache.
            rows = self._run([p for p in prompts for _ in range(G)], generation, seed, ending)
        return [rows[i : i + G] for i in range(0, len(rows), G)]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        generation: settings.Generation,
        seed: int,
        ending: Ending,
    ) -> list[Sampled]:
        engine, seeds = self._llm.llm_engine, random.Random(seed)
        rows: dict[str, _Row] = {}
        for prompt in prompts:
            name = str(next(self._numbers))
            rows[name] = _Row()
            params = self._params(generation, seeds.getrandbits(32), ending)
            engine.add_request(name, {"type": "token", "prompt_token_ids": list(prompt)}, params)
        while engine.has_unfinished_requests():
            ended = [
                o.request_id
                for o in engine.step()
                if rows[o.request_id].extend(o.outputs[0], ending)
            ]
            if ended:
                engine.abort_request(ended)
        return [row.sampled() for row in rows.values()]

    def _params(self, generation: settings.Generation, seed: int, ending: Ending) -> Any:
        from vllm.sampling_params import RequestOutputKind

        return self._sampling_params(
            max_tokens=generation.max_completion_length,
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            min_p=generation.min_p or 0.0,
            repetition_penalty=generation.repetition_penalty,
            seed=seed,
            ignore_eos=True,  # which tokens end an answer is ours to say
            stop_token_ids=sorted(ending.end_ids),
            logprobs=0,  # of the token that was drawn alone
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _bring_weights(self) -> None:
        """Have vLLM compute with the weights that the model has now."""
        seen = fingerprint(self._model)
        if seen == self._seen:
            return
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights()})
        if self._llm.reset_prefix_cache() is False:
            raise ModelError(
                f"{self.name}: keeps the keys and values of weights that it has no more"
            )
        self._seen = seen

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from lora.merged_weights_as(self._model, self._dtype)
        head, embedding = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        if self._is_untied and head.weight is embedding.weight:
            yield "lm_head.weight", head.weight.detach().to(self._dtype)

    def _require_agreement(self, generation: settings.Generation) -> None:
        """Its log-probabilities are what the trainer takes for its own: see that they are, on a few
        answers."""
        count = self._model.get_output_embeddings().weight.shape[0]
        prompts = [[(7 * i + 3) % count for i in range(n)] for n in (24, 9)]
        length = min(4, generation.max_completion_length)
        plain = settings.Generation(num_generations=2, max_completion_length=length)
        groups = self.generate(
            prompts, plain, 0, Ending(frozenset(), lambda tokens: False, [False] * count)
        )
        rows = [row for group in groups for row in group]
        with torch.no_grad():
            ours = completion_logprobs(
                self._model, prompts, [r.token_ids for r in rows], [0, 0, 1, 1], 1.0
            )
        theirs = torch.tensor([row.logprobs for row in rows], device=ours.device)
        error = float((ours - theirs).abs().mean())
        if not error <= _LARGEST_ERROR[self._dtype]:
            raise ModelError(
                f"{self.name}: its log-probabilities of {self._model.config.model_type} are"
                f" {error:.2g} from those of transformers on average,"
                f" {_LARGEST_ERROR[self._dtype]:g} are allowed; set generation.engine: torch"
            )


class _Row:
    """An answer under way."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._finished = False

    def extend(self, output: Any, ending: Ending) -> bool:
        """Add what vLLM has drawn; whether it must be told to stop."""
        for token, logprobs in zip(output.token_ids, output.logprobs, strict=True):
            if not self._finished:
                self._tokens.append(token)
                self._logprobs.append(logprobs[token].logprob)
                self._finished = ending.reached(self._tokens)
        return self._finished and output.finish_reason is None

    def sampled(self) -> Sampled:
        return Sampled(tuple(self._tokens), tuple(self._logprobs), self._finished)


def _start(make: Any, model: Any, dtype: torch.dtype, generation: settings.Generation) -> Any:
    """vLLM's LLM, with weights of no meaning as yet."""
    arguments = _arguments(model.device, dtype, generation)
    with (
        tempfile.TemporaryDirectory(prefix="hivewright-vllm-") as folder,
        _own_random_numbers(model.device),
    ):
        _describe(model, Path(folder))
        return make(model=folder, **arguments)


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """vLLM sets seeds and draws: the states of this process, which a checkpoint goes on from, stay
    as they are."""
    state = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(state)


def _arguments(
    device: torch.device, dtype: torch.dtype, generation: settings.Generation
) -> dict[str, Any]:
    return {
        # As torch counts them: of those that are visible.
        **({"device_ids": [device.index]} if device.type == "cuda" and device.index else {}),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # none of the model's own: ours are the settings
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": generation.max_prompt_length + generation.max_completion_length,
        "gpu_memory_utilization": generation.vllm_memory,
        "enable_prefix_caching": True,
        # At the sampling temperature. vLLM knows this before the limits only for temperature 1;
        # after them, as in TRL.
        "logprobs_mode": "raw_logprobs" if generation.temperature == 1 else "processed_logprobs",
        "distributed_executor_backend": "uni",
        "async_scheduling": False,  # else a step is under way when we change the weights
        "seed": 0,
    }


def _describe(model: Any, folder: Path) -> None:
    """The model's configuration as transformers would have saved it with weights."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if model.device.type == "cpu":
        # There vLLM packs the output layer apart from the embedding that it is tied to: it would
        # not follow it.
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
