# ruff: noqa: N803 - tensors are named with their axes
"""The interfaces of generation engines and decoders.

An engine samples G answers to each prompt, with the policy's log-probabilities of their tokens.
"""

# R rows (answers in progress), T new tokens, V vocabulary

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from worker import settings


@dataclass(frozen=True, slots=True)
class Sampled:
    """One answer: `token_ids` (T,), `logprobs` (T,) of the policy, and whether it is complete.

    The log-probabilities are at the sampling temperature, before top-k, top-p, min-p and repetition
    penalty, as the trainer computes them. (Exception, as in TRL: with vLLM at a temperature other
    than 1 they are those after these limits.)
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


@dataclass(frozen=True, slots=True)
class Ending:
    """The rule by which an answer ends.

    It ends after one of `end_ids`, which is kept in its tokens, or when `is_done` returns True for
    its tokens. `is_done` is called only after tokens whose flag in `may_be_done` (one per token of
    the vocabulary) is set.
    """

    end_ids: frozenset[int]
    is_done: Callable[[list[int]], bool]
    may_be_done: Sequence[bool]

    def reached(self, tokens: list[int]) -> bool:
        last = tokens[-1]
        return last in self.end_ids or (self.may_be_done[last] and self.is_done(tokens))


@dataclass(frozen=True, slots=True)
class Setback:
    """A reason why an engine is slower, or computes in another precision, than intended."""

    of: Literal["engine", "precision"]
    reason: str


class Engine(Protocol):
    """A way to sample answers from a model."""

    @property
    def name(self) -> str:
        """Return a name for the log: the decoder, and the type in which it computes."""

    @property
    def setbacks(self) -> Sequence[Setback]:
        """Return the setbacks: deviations from the settings, or from what this machine could do."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        generation: settings.Generation,
        seed: int,
        ending: Ending,
    ) -> list[list[Sampled]]:
        """Sample `generation.num_generations` answers to each prompt (token ids, none empty).

        An answer ends by the rule `ending`, or unfinished at max_completion_length. Raises
        ResourceError if not even one answer fits into memory.
        """


class Batch(Protocol):
    """The answers in progress of a decoder."""

    def step(self, tokens_R: Tensor) -> Tensor:
        """Append one token to each row; return the logits (R, V) of the next ones."""

    def keep(self, lines: Sequence[int]) -> None:
        """Keep only these lines of the batch, in this order, which must be ascending."""


class Decoder(Protocol):
    """A model that continues prompts, one token at a time."""

    compact_below: float
    """Drop complete rows once less than this share of a batch is in progress. Dropping rows copies
    the others, which costs as much as some steps."""

    @property
    def name(self) -> str:
        """Return a name for the log: the method, and the type in which it computes."""

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
    ) -> tuple[Batch, Tensor]:
        """Return a batch with a row for each prompt, and the logits (R, V) of their first tokens.

        Equal prompts go through the model once.
        """

    def bytes_needed(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
    ) -> int:
        """Return an upper estimate of the memory of such a batch, in bytes."""
