# ruff: noqa: N803 - tensors are named with their axes
"""The interface of generation engines: prompts in, G sampled answers each out, with the policy's
own log-probabilities."""

# R rows (answers under way), T new tokens, V vocabulary

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from worker import settings


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row: `token_ids` (T,), `logprobs` (T,) of the policy, and whether it came to an end.

    The log-probabilities are at the temperature that was sampled with, before top-k, top-p, min-p
    and repetition penalty: what the trainer computes for the same tokens. (vLLM at temperatures
    other than 1: after these, as in TRL.)
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


@dataclass(frozen=True, slots=True)
class Ending:
    """When an answer is over: after one of `end_ids` (kept in its tokens), or when `is_done` says
    so of its tokens.

    `is_done` is asked only after tokens that `may_be_done` (one flag a token of the vocabulary)
    marks.
    """

    end_ids: frozenset[int]
    is_done: Callable[[list[int]], bool]
    may_be_done: Sequence[bool]

    def reached(self, tokens: list[int]) -> bool:
        last = tokens[-1]
        return last in self.end_ids or (self.may_be_done[last] and self.is_done(tokens))


@dataclass(frozen=True, slots=True)
class Setback:
    """One reason why an engine is slower, or computes in another precision, than it was meant
    to."""

    of: Literal["engine", "precision"]
    reason: str


class Engine(Protocol):
    @property
    def name(self) -> str:
        """For people: what samples, and in what type."""

    @property
    def setbacks(self) -> Sequence[Setback]:
        """Return where it falls short of what the settings ask for, or of what this machine could
        do."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        generation: settings.Generation,
        seed: int,
        ending: Ending,
    ) -> list[list[Sampled]]:
        """G = `generation.num_generations` answers to each prompt (token ids, none empty).

        A row ends as `ending` says, or unfinished at max_completion_length. Raises ResourceError if
        memory does not take even one row.
        """


class Batch(Protocol):
    """Answers under way, of a decoder."""

    def step(self, tokens_R: Tensor) -> Tensor:
        """Logits (R, V) after one more token for each row."""

    def keep(self, lines: Sequence[int]) -> None:
        """Only these lines of the batch go on, in this order, which rises."""


class Decoder(Protocol):
    """A model that goes on from prompts, a token at a time."""

    compact_below: float
    """Rows are copied together once fewer than this share of a batch is alive: copying costs as
    much as some steps."""

    @property
    def name(self) -> str:
        """For people: how it computes, and in what type."""

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[Batch, Tensor]:
        """A row for each prompt, and the logits (R, V) of their first tokens. Equal prompts are
        read once."""

    def bytes_needed(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
        """Return what such a batch takes of memory at most, as far as that can be told before."""
