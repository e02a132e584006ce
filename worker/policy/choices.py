"""Score given answers to a question by their log-probability, in one batched pass."""

import functools
import math
import time
from collections.abc import Callable

import torch

from worker.environments.answers import tagged
from worker.errors import NotScored
from worker.policy import memory
from worker.policy.logprobs import PromptGroup, Scorer
from worker.policy.policy import Policy
from worker.settings import Generation

_FIRST_TOKENS = 32
"""Number of tokens of the prompt, and of the answer, of a pass that measures the speed."""


class ChoiceScorer:
    """Score choices with the policy, if there are enough time and memory.

    The time is predicted from the last pass, since a pass can't be interrupted. Questions and
    choices may have the lengths that `generation` allows, which fit into the model's context.
    `max_tokens` returns the number of tokens for which a pass has memory now.
    """

    def __init__(
        self,
        policy: Policy,
        generation: Generation,
        max_tokens: Callable[[], int],
    ) -> None:
        self._policy = policy
        self._generation = generation
        self._max_tokens = max_tokens
        self._seconds_per_token = math.inf

    def logprobs(
        self,
        question: str,
        choices: list[str],
        seconds: float,
    ) -> list[float]:
        """Return the log-probability of `<answer>CHOICE</answer>` for each choice.

        Raises NotScored if the question or a choice is too long, if the pass would take more than
        `seconds`, or if there is not enough memory for it.
        """
        group = self._tokens(question, choices)
        try:
            self._require_room(group, seconds)
            return self._run(group)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            reason = memory.reason_of(error)
        # Out of the except block, so that the error's frames no longer keep tensors alive.
        memory.release(self._policy.model.device)
        raise NotScored(f"out of memory while the model scored the choices ({reason})")

    def _tokens(
        self,
        question: str,
        choices: list[str],
    ) -> PromptGroup:
        limits = self._generation
        answers = [tagged(choice) for choice in choices]
        prompt = tuple(self._policy.prompt_ids(question, answers[0]))
        if not 0 < len(prompt) <= limits.max_prompt_length:
            raise NotScored(
                f"the clue has {len(prompt)} tokens; expected 1 to {limits.max_prompt_length}"
                " (generation.max_prompt_length)"
            )
        completions = []
        for answer in answers:
            ids, is_cut = self._policy.completion_ids(answer, limits.max_completion_length)
            if is_cut:
                raise NotScored(
                    f"a choice has more than {limits.max_completion_length} tokens"
                    " (generation.max_completion_length)"
                )
            completions.append(tuple(ids))
        return PromptGroup(prompt, tuple(completions))

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._policy.model)

    def _count(self, group: PromptGroup) -> int:
        return self._scorer.count_tokens([group.prompt], [len(c) for c in group.completions])

    def _require_room(
        self,
        group: PromptGroup,
        seconds: float,
    ) -> None:
        """Raise NotScored if the pass would take too long, or too much memory."""
        num_tokens, most = self._count(group), self._max_tokens()
        if num_tokens > most:
            raise NotScored(
                f"clue and choices have {num_tokens} tokens together; this node has memory for"
                f" {most}"
            )
        if self._seconds_per_token * num_tokens > seconds:
            # The first question, or the machine was busy during the last pass: measure again.
            short = group.completions[0][:_FIRST_TOKENS]
            self._run(PromptGroup(group.prompt[:_FIRST_TOKENS], (short,)))
        predicted = self._seconds_per_token * num_tokens
        if predicted > seconds:
            raise NotScored(f"the model would need {predicted:.1f} s; {seconds:g} s are allowed")

    @torch.no_grad()
    def _run(self, group: PromptGroup) -> list[float]:
        started = time.monotonic()
        with self._scorer.passes():
            found = self._scorer.logprobs([group], 1.0)
        lengths = [len(completion) for completion in group.completions]
        sums = [float(part.sum()) for part in torch.split(found, lengths)]
        self._seconds_per_token = (time.monotonic() - started) / self._count(group)
        return sums
