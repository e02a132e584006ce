"""Load the language model that is trained, with its tokenizer, and generate answers with it.

`hivewright/tiny` is a model that is part of the package (made by scripts/tiny_model.py). Any local
folder or Hugging Face name that transformers loads as a causal language model can be used instead.
"""

import io
import logging
from collections.abc import Collection, Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import httpx2  # the HTTP client of huggingface_hub
import torch
from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from worker import settings
from worker.environments.answers import BEGIN, END, PLACEHOLDER, tagged
from worker.errors import ModelError
from worker.policy import memory
from worker.policy.engines import decoder_check
from worker.policy.engines.batching import Rows
from worker.policy.engines.engine import Ending, Engine, Sampled
from worker.policy.engines.torch_engine import load_engine
from worker.policy.model_sizing import (
    TINY,
    auto_dtype,
    chosen_device,
    compare_context,
    find_source_folder,
    gguf_arguments,
)
from worker.policy.prompt_forms import DEFAULT, INSTRUCTION, Form, Template, Turns, is_open_thought
from worker.records import Completion

__all__ = ["HUB", "INSTRUCTION", "Policy", "load", "look_up"]

log = logging.getLogger(__name__)

HUB = HfApi()
_LOOKUP_SECONDS = 10.0
_KEY = "model.token_file (model_token_file in an inventory; `hivewright fetch` alone reads it)"
_EXAMPLE = "Qwen/Qwen2.5-0.5B-Instruct"
_BEFORE = "\n"
"""Text put before an answer when it is encoded or decoded, and removed from the result.

Some tokenizers (Llama 2's) add a space at the beginning of a text and drop one when they decode.
That is wrong for an answer, which follows its prompt.
"""
_TAIL_TOKENS = 16
"""Number of last tokens that are decoded to find `</answer>`; no tokenizer splits it into more."""


class Policy:
    """A model and its tokenizer.

    The model is always in evaluation mode: dropout is used neither in training nor in sampling.
    `folder` has the files that the model was loaded from; None: unknown, or not in transformers'
    format.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        folder: Path | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.folder = folder
        self._before_ids = self._find_before_ids()
        end = model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        self.end_ids: tuple[int, ...] = tuple(
            dict.fromkeys(
                i for i in (tokenizer.eos_token_id, *ends) if i is not None and i < self.num_tokens
            )
        )
        if not self.end_ids:
            raise ModelError(
                f"model {name}: its tokenizer has no end-of-sequence token; take a model that"
                " has one"
            )
        self._ending = Ending(
            frozenset(self.end_ids),
            self._has_answer_end,
            [">" in text for text in self._decode_each_token()],
        )
        self._rows = Rows(model.device)
        self._questions: tuple[str, ...] = decoder_check.QUESTIONS
        self._engine: Engine | None = None
        self._engine_for: tuple[Any, str, str] | None = None
        self._require_tag()
        self.template = Template(tokenizer, name, settings.Generation())
        self.form = DEFAULT
        self._beginning_ids: list[int] = []

    @property
    def num_tokens(self) -> int:
        """The number V of rows of the output matrix; it may exceed the tokenizer's vocabulary."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def require_context(self, generation: settings.Generation) -> None:
        """Raise ModelError if the longest prompt and completion together exceed the context."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        compare_context(self.name, context, generation)

    def adopt(self, generation: settings.Generation) -> None:
        """Use these settings to render the chat template; raise ModelError if that fails."""
        self.template = Template(self.tokenizer, self.name, generation)
        self.template.text(self.form, "question")

    def ask_in(self, form: Form) -> None:
        """Use `form` for all following questions.

        Raises ModelError if the model's chat template can't be rendered in it.
        """
        self.template.text(form, "question")
        self.form = form
        self._beginning_ids = self._text_ids(form.beginning) if form.beginning else []

    def can_ask_in(self, form: Form) -> bool:
        """Return whether the model's chat template can be rendered in this form."""
        try:
            self.template.text(form, "question")
        except ModelError as error:
            log.debug("form left out form=%s reason=%s", form.name, error)
            return False
        return True

    def prompt_ids(
        self,
        question: str,
        answer: str | None = None,
    ) -> list[int]:
        """Return the token ids before an answer: the question in the form, and its `beginning`.

        If `answer` (a peer's text) does not start with the form's `beginning`, the beginning is
        left out. None: the answer is not known yet.
        """
        ids = self.template.ids(self.form, question)
        if answer is None or answer.startswith(self.form.beginning):
            ids += self._beginning_ids
        return ids

    def completion_ids(
        self,
        text: str,
        max_length: int,
    ) -> tuple[list[int], bool]:
        """Return a decoded answer's token ids, at most `max_length`, and whether it is truncated.

        The ids follow `prompt_ids(question, text)`, so they lack the form's `beginning` if `text`
        starts with it. The text does not show whether an end token followed it, so this rule
        decides: an answer that ends with the closing tag was stopped there; another answer that is
        shorter than `max_length` gets an end token; any other is cut off at `max_length` and is
        truncated.
        """
        ids = self._text_ids(text.removeprefix(self.form.beginning))
        if len(ids) <= max_length and text.endswith(END):
            return ids, False
        if len(ids) < max_length:
            return [*ids, self.end_ids[0]], False
        return ids[:max_length], True

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a decoded answer, without an end token."""
        return len(self._text_ids(text))

    def _text_ids(self, text: str) -> list[int]:
        before = self._before_ids
        ids = self._encode(_BEFORE + text) if before else self._encode(text)
        if ids[: len(before)] != before:  # _BEFORE was merged with the text into one token
            before, ids = [], self._encode(text)
        # Some tokenizers have more tokens than the model's output matrix has rows.
        return [token for token in ids[len(before) :] if token < self.num_tokens]

    def _encode(self, text: str) -> list[int]:
        # The name of a special token in a peer's text must not become that token.
        return list(
            self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        )

    def _decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of an answer, without special tokens."""
        text: str = self.tokenizer.decode([*self._before_ids, *token_ids], skip_special_tokens=True)
        return text.removeprefix(_BEFORE) if self._before_ids else text

    def _find_before_ids(self) -> list[int]:
        """Return the token ids of _BEFORE; empty if the position of a text does not change its ids.

        Also empty if _BEFORE can't be encoded and decoded without loss.
        """
        before, both = self._encode(_BEFORE), self._encode(f"{_BEFORE}a")
        if both == before + self._encode("a") or self.tokenizer.decode(before) != _BEFORE:
            return []
        return before

    def generate(
        self, questions: Sequence[str], generation: settings.Generation, seed: int
    ) -> list[list[Completion] | None]:
        """Return `generation.num_generations` answers to each question.

        An item is None if the question's prompt exceeds max_prompt_length.
        """
        prompts = [self.prompt_ids(question) for question in questions]
        fitting = [
            i for i, prompt in enumerate(prompts) if len(prompt) <= generation.max_prompt_length
        ]
        groups = self._load_engine(generation).generate(
            [prompts[i] for i in fitting], generation, seed, self._ending
        )
        answers: list[list[Completion] | None] = [None] * len(prompts)
        for i, group in zip(fitting, groups, strict=True):
            answers[i] = [self._completion(row) for row in group]
        return answers

    def reply(
        self,
        turns: Turns,
        generation: settings.Generation,
        seed: int,
    ) -> Completion | None:
        """Return the model's next turn of a conversation, up to an end token.

        None if the conversation exceeds max_prompt_length.
        """
        prompt = self.template.chat_ids(turns)
        if len(prompt) > generation.max_prompt_length:
            return None
        until_its_end = Ending(
            frozenset(self.end_ids), lambda tokens: False, [False] * self.num_tokens
        )
        ((row, *_),) = self._load_engine(generation).generate(
            [prompt], generation, seed, until_its_end
        )
        return Completion(
            self._decode(row.token_ids), row.token_ids, row.logprobs, truncated=not row.finished
        )

    def prepare(
        self,
        generation: settings.Generation,
        file: Path,
        questions: Sequence[str] = decoder_check.QUESTIONS,
    ) -> None:
        """Load the generation engine before the first question.

        `file` stores the number of answers that fit into memory at once. `questions` are examples
        of those that will be asked; the engine is checked with them.
        """
        self._questions = tuple(questions)
        lengths = f"{generation.max_prompt_length}+{generation.max_completion_length}"
        machine = memory.describe(self.model.device)
        self._rows.remember_in(
            file,
            f"{self.name} by {generation.engine} in {generation.dtype} on {machine}, {lengths}"
            " tokens",
        )
        self._load_engine(generation)

    @property
    def engine(self) -> Engine | None:
        """The generation engine; None if it is not loaded yet."""
        return self._engine

    @property
    def answers_share(self) -> float | None:
        """The share of a batch of answers that fitted into memory at once; None: no batch yet."""
        return self._rows.smallest_share

    def _load_engine(self, generation: settings.Generation) -> Engine:
        wanted = (self.model, generation.engine, generation.dtype)
        if self._engine is None or self._engine_for != wanted:
            prompts = [self.prompt_ids(question) for question in self._questions]
            self._engine, self._engine_for = (
                load_engine(self.model, generation, self._rows, prompts),
                wanted,
            )
            log.info("generation engine=%s", self._engine.name)
        return self._engine

    def _completion(self, row: Sampled) -> Completion:
        return Completion(
            self.form.beginning + self._decode(row.token_ids),
            row.token_ids,
            row.logprobs,
            truncated=not row.finished,
        )

    def _has_answer_end(self, token_ids: list[int]) -> bool:
        """Return whether the tokens contain a complete answer.

        That is a closed answer tag outside a thought; the instruction's own placeholder in it does
        not count as an answer.
        """
        if END not in self.tokenizer.decode(token_ids[-_TAIL_TOKENS:], skip_special_tokens=True):
            return False
        text = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        if is_open_thought(text) or (self.template.opens_thought and "</think>" not in text):
            return False
        return not text.rpartition(END)[0].endswith(f"{BEGIN}{PLACEHOLDER}")

    def _require_tag(self) -> None:
        """Raise ModelError if the tokenizer can't encode and decode an answer tag without loss."""
        sample = tagged("7")
        if (text := self._decode(self._text_ids(sample))) != sample:
            raise ModelError(
                f"model {self.name}: its tokenizer can't write {sample} (it becomes {text[:40]!r}),"
                " so that no answer could ever be right; take another model"
            )

    def _decode_each_token(self) -> list[str]:
        known = min(self.num_tokens, len(self.tokenizer))
        tokens = self.tokenizer.convert_ids_to_tokens(list(range(known)))
        return [token or "" for token in tokens] + [""] * (self.num_tokens - known)


def load(model: settings.Model) -> Policy:
    """Load the model that the settings name, on its device.

    Raises ModelError, also without a network, if the name does not exist, the folder does not
    contain a model, weights are truncated, missing or not finite, the device does not exist, or the
    model does not fit into memory.
    """
    if model.threads is not None:
        torch.set_num_threads(model.threads)
    device = _find_device(model)
    dtype = _dtype_to_load(model, device)
    disable_progress_bar()  # a service logs whole lines
    source, gguf = _find_source(model), gguf_arguments(model)
    try:
        # Code in a model's repository is never run, whatever transformers' default is.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **gguf)
        # transformers' GGUF reader draws a progress bar that can't be turned off by a setting.
        with redirect_stderr(io.StringIO()) if gguf else nullcontext():
            weights, found = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, trust_remote_code=False, output_loading_info=True, **gguf
            )
        weights = text_part(weights)
        if model.dtype == "auto":
            dtype = getattr(torch, auto_dtype(device.type, weights.num_parameters()))
            _cast_parameters(weights, dtype)
        weights.to(device)
        if gguf and hasattr(weights.config, "quantization_config"):
            # The loaded weights are not quantised; with this entry they could not be saved.
            del weights.config.quantization_config
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"model {model.name}: does not fit into the memory of {device}:"
            f" {memory.reason_of(error)}"
        ) from error
    # transformers raises these for files that do not match, and safetensors for truncated ones.
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model {model.name}: can't be loaded from {source}: {memory.reason_of(error)};"
            " expected a causal language model in transformers' format (config.json,"
            " *.safetensors, tokenizer.json)"
        ) from error
    _require_sound_weights(weights, found["missing_keys"], f"model {model.name}", source)
    log.info(
        "model loaded name=%s device=%s dtype=%s parameters=%d",
        model.name,
        device,
        dtype,
        weights.num_parameters(),
    )
    return Policy(weights, tokenizer, model.name, None if gguf else _find_loaded(source))


def _find_loaded(source: str) -> Path | None:
    """Return the folder of the files of a loaded model; None if Hugging Face's cache lacks them."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(HUB.snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, OSError) as error:
        log.debug("files of the model not found name=%s reason=%s", source, error)
        return None


def _require_sound_weights(
    weights: Any, missing_keys: Collection[str], name: str, source: str
) -> None:
    """Raise ModelError if weights are missing or not finite.

    transformers initialises missing weights at random.
    """
    if missing := sorted(missing_keys):
        raise ModelError(
            f"{name}: {source} lacks {len(missing)} of its weights, such as {missing[0]}; expected"
            " all weights that config.json implies; get the files again"
        )
    for parameter_name, parameter in weights.named_parameters():
        if not parameter.sum(dtype=torch.float32).isfinite():
            raise ModelError(
                f"{name}: {parameter_name} in {source} has values that are not finite; expected"
                " a model that was saved before it broke"
            )


def text_part(model: Any) -> Any:
    """Return the language model of a multimodal one (Gemma 3 and 4), or any other model itself."""
    language_model = getattr(model.base_model, "language_model", None)
    if language_model is None:
        return model
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(language_model.config, trust_remote_code=False)
    text.model, text.lm_head = language_model, model.lm_head
    text.config, text.generation_config = language_model.config, model.generation_config
    log.info(
        "using only the model's text part type=%s of=%s",
        text.config.model_type,
        model.config.model_type,
    )
    return text


def _find_device(model: settings.Model) -> torch.device:
    device = torch.device(chosen_device(model))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"model.device: {model.device}: torch sees {torch.cuda.device_count()} GPUs; expected"
            " one of those, or cpu"
        )
    return device


def _dtype_to_load(
    model: settings.Model,
    device: torch.device,
) -> torch.dtype:
    """Return the dtype to read the files with.

    With "auto" on a CPU this is float32; `load` then chooses by the model's size, which is not
    known before the files are read.
    """
    if model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if model.dtype == "bfloat16" else torch.float32


def _cast_parameters(model: Any, dtype: torch.dtype) -> None:
    """Cast the parameters, but not the buffers.

    Buffers such as the frequencies of rotary positions keep their precision.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _find_source(model: settings.Model) -> str:
    """Return the source for transformers: a folder, or a Hugging Face name that exists.

    Raises ModelError as `look_up` does, or if Hugging Face can't be reached and the model is not in
    the local cache.
    """
    name = model.name
    if (folder := find_source_folder(model)) is not None:
        return str(folder)
    found = look_up(name)
    if not isinstance(found, str):
        return name
    return _find_cached(name, found)


def look_up(
    name: str,
    token: str | None = None,
) -> ModelInfo | str:
    """Return Hugging Face's information about a model, with the sizes of its files.

    Returns the reason as text if Hugging Face can't be reached. `token` None: huggingface_hub uses
    the token of this machine, if there is one. Raises ModelError if the name is invalid, the model
    does not exist, or the token does not give access to it.
    """
    try:
        return HUB.model_info(name, timeout=_LOOKUP_SECONDS, files_metadata=True, token=token)
    except HFValidationError:
        raise ModelError(
            f"model.name: {name}: neither a folder nor a Hugging Face name (owner/model)"
        ) from None
    except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
            said = error.server_message or memory.reason_of(error)
            is_gated = isinstance(error, GatedRepoError)
            has_token = isinstance(token, str)
            raise ModelError(
                refusal(name, error.response.status_code, said, has_token, is_gated)
            ) from None
        return memory.reason_of(error)


def refusal(
    name: str,
    status: int,
    said: str,
    has_token: bool,
    is_gated: bool,
) -> str:
    """Return the message for a refusal by Hugging Face: the cause and the remedy.

    Without a token, Hugging Face answers 401 both for private models and for names that do not
    exist, so that the answer does not reveal private names.
    """
    answer = (
        f"model.name: {name}: Hugging Face says {status} ({said.strip().splitlines()[0][:120]})"
    )
    if is_gated or status == 403:
        terms = f"accept its terms at {HUB.endpoint}/{name} with the account of the token"
        if has_token:
            return (
                f"{answer}: gated, or not for this token; {terms}, or name a token that may read it"
                f" in {_KEY}"
            )
        return f"{answer}: gated; {terms}, and name a file with that token in {_KEY}"
    if status == 401 and has_token:
        return (
            f"{answer}: it rejects the token; make one that may read the model, and name its"
            f" file in {_KEY}"
        )
    if status == 401:
        return (
            f"{answer}: private or gated, or there is no such model; check the name, and if it is"
            f" right, name a file with a token that may read it in {_KEY}"
        )
    private = (
        "or one that this token may not see"
        if has_token
        else f"or a private one, which needs {_KEY}"
    )
    return (
        f"{answer}: no such model, {private}; expected a name such as {_EXAMPLE}, a folder, or"
        f" {TINY}"
    )


def _find_cached(name: str, reason: str) -> str:
    try:
        return str(HUB.snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        raise ModelError(
            f"model.name: {name}: not on this machine, and Hugging Face can't be reached"
            f" ({reason}); expected a folder, {TINY}, or a name that was loaded here before"
        ) from None
