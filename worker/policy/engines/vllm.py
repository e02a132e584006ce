# ruff: noqa: N806 - tensors are named with their axes
"""Generate with vLLM, in this process and on the model's GPU, if it is installed.

vLLM gets only the model's configuration. The worker hands over its weights at the start and after
each change, with adapters merged, and then resets the prefix cache. vLLM has no tokenizer: prompts
are token ids, and the worker ends an answer by the rule that all engines share.

vLLM applies min-p before top-p, transformers after it. With both set its nucleus is a little
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
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # we could not reach the weights in another process
    "VLLM_CONFIGURE_LOGGING": "0",  # its log lines go to our log
    "VLLM_NO_USAGE_STATS": "1",  # no usage reports to its developers
}
"""Options that vLLM reads only from the environment."""

_UNFIT = (
    ValueError,
    RuntimeError,
    AssertionError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
)
"""Errors that vLLM raises for an unsupported model, machine or version; it has no class of its own
for these."""

_LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest mean difference between vLLM's log-probabilities and the trainer's, by type."""


def is_installed() -> bool:
    """Return whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


class VllmEngine:
    """Generates with vLLM.

    Raises ModelError if vLLM can't run this model here, or disagrees with transformers about it.
    """

    def __init__(
        self,
        model: Any,
        generation: settings.Generation,
    ) -> None:
        os.environ.update(_ENVIRONMENT)
        try:
            import vllm
        # RuntimeError: built for another torch.
        except (ImportError, OSError, RuntimeError) as error:
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
            # The answers to a prompt are adjacent, so they find its keys in vLLM's prefix cache.
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

    def _params(
        self,
        generation: settings.Generation,
        seed: int,
        ending: Ending,
    ) -> Any:
        from vllm.sampling_params import RequestOutputKind

        return self._sampling_params(
            max_tokens=generation.max_completion_length,
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            min_p=generation.min_p or 0.0,
            repetition_penalty=generation.repetition_penalty,
            seed=seed,
            ignore_eos=True,  # `ending` decides which tokens end an answer
            stop_token_ids=sorted(ending.end_ids),
            logprobs=0,  # only that of the drawn token
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _bring_weights(self) -> None:
        """Hand the model's present weights over to vLLM if they have changed."""
        seen = fingerprint(self._model)
        if seen == self._seen:
            return
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights()})
        if self._llm.reset_prefix_cache() is False:
            raise ModelError(
                f"{self.name}: can't reset its prefix cache, which belongs to earlier weights"
            )
        self._seen = seen

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from lora.merged_weights_as(self._model, self._dtype)
        head, embedding = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        if self._is_untied and head.weight is embedding.weight:
            yield "lm_head.weight", head.weight.detach().to(self._dtype)

    def _require_agreement(self, generation: settings.Generation) -> None:
        """Check on a few answers that vLLM's log-probabilities are those of the trainer."""
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
    """An answer in progress."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._finished = False

    def extend(self, output: Any, ending: Ending) -> bool:
        """Add the tokens that vLLM has drawn; return whether it must abort the request."""
        for token, logprobs in zip(output.token_ids, output.logprobs, strict=True):
            if not self._finished:
                self._tokens.append(token)
                self._logprobs.append(logprobs[token].logprob)
                self._finished = ending.reached(self._tokens)
        return self._finished and output.finish_reason is None

    def sampled(self) -> Sampled:
        return Sampled(tuple(self._tokens), tuple(self._logprobs), self._finished)


def _start(
    make: Any,
    model: Any,
    dtype: torch.dtype,
    generation: settings.Generation,
) -> Any:
    """Return an LLM of vLLM with dummy weights."""
    arguments = _arguments(model.device, dtype, generation)
    with (
        tempfile.TemporaryDirectory(prefix="hivewright-vllm-") as folder,
        _own_random_numbers(model.device),
    ):
        _describe(model, Path(folder))
        return make(model=folder, **arguments)


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """Restore this process's random states, which checkpoints save, after vLLM has used them."""
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
        # The index among the visible devices, as in torch.
        **({"device_ids": [device.index]} if device.type == "cuda" and device.index else {}),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # ignores the model's generation config
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": generation.max_prompt_length + generation.max_completion_length,
        "gpu_memory_utilization": generation.vllm_memory,
        "enable_prefix_caching": True,
        # At the sampling temperature. For temperatures other than 1, vLLM has these only after the
        # limits, as in TRL.
        "logprobs_mode": "raw_logprobs" if generation.temperature == 1 else "processed_logprobs",
        "distributed_executor_backend": "uni",
        "async_scheduling": False,  # otherwise weights would change during a step
        "seed": 0,
    }


def _describe(model: Any, folder: Path) -> None:
    """Save the model's configuration as transformers would save it along with the weights."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if model.device.type == "cpu":
        # On a CPU vLLM packs the output layer separately, so it would not follow the embedding that
        # it is tied to.
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
