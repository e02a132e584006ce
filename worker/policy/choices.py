"""Score given answers to a question by their log-probability, in one batched pass."""

import time

import torch

from worker.environments.answers import tagged
from worker.policy.logprobs import PromptGroup, Scorer
from worker.policy.policy import Policy

_FIRST_TOKENS = 32
"""Tokens of the pass that measures the speed before the first question."""


class ChoiceScorer:
    """Score choices with the policy, if that does not take too long.

    The time is predicted from the last pass, since a pass can't be interrupted.
    """

    def __init__(self, policy: Policy, max_prompt_length: int) -> None:
        self._policy = policy
        self._scorer = Scorer(policy.model)
        self._max_prompt_length = max_prompt_length
        self._seconds_per_token: float | None = None

    def logprobs(
        self,
        question: str,
        choices: list[str],
        seconds: float,
    ) -> list[float] | None:
        """Return the log-probability of `<answer>CHOICE</answer>` for each choice.

        None: the question is too long, or the pass would take more than `seconds`.
        """
        group = self._tokens(question, choices)
        if not 0 < len(group.prompt) <= self._max_prompt_length:
            return None
        if self._seconds_per_token is None:
            short = group.completions[0][:_FIRST_TOKENS]
            self._run(PromptGroup(group.prompt[:_FIRST_TOKENS], (short,)))
        predicted = (self._seconds_per_token or 0.0) * self._count(group)
        return None if predicted > seconds else self._run(group)

    def _tokens(
        self,
        question: str,
        choices: list[str],
    ) -> PromptGroup:
        answers = [tagged(choice) for choice in choices]
        completions = [
            tuple(self._policy.completion_ids(answer, len(answer) + 1)[0]) for answer in answers
        ]
        prompt = tuple(self._policy.prompt_ids(question, answers[0]))
        return PromptGroup(prompt, tuple(completions))

    def _count(self, group: PromptGroup) -> int:
        return self._scorer.count_tokens([group.prompt], [len(c) for c in group.completions])

    @torch.no_grad()
    def _run(self, group: PromptGroup) -> list[float]:
        started = time.monotonic()
        with self._scorer.passes():
            found = self._scorer.logprobs([group], 1.0)
        lengths = [len(completion) for completion in group.completions]
        sums = [float(part.sum()) for part in torch.split(found, lengths)]
        self._seconds_per_token = (time.monotonic() - started) / self._count(group)
        return sums
