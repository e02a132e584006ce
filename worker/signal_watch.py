"""Warn if a node's answers have no learning signal, with advice on the likely cause."""

import logging
from collections.abc import Sequence
from statistics import fmean

from worker.environments.answers import is_closed
from worker.policy.policy import Policy
from worker.records import ScoredGroup, StepMetrics
from worker.settings import Generation
from worker.trainer.credit import closed_share

log = logging.getLogger(__name__)

WARN_AFTER_ROUNDS = 16  # rounds in a row without a signal; a power of two
_MAJORITY = 0.5


class SignalWatch:
    """Counts the rounds in a row without a learning signal."""

    def __init__(self, policy: Policy, generation: Generation) -> None:
        self._policy = policy
        self._generation = generation
        self.rounds_without = 0

    def see(self, metrics: StepMetrics, local: Sequence[ScoredGroup]) -> None:
        """Note a step; warn after 16, 32, 64... rounds in a row without a learning signal."""
        self.rounds_without = self.rounds_without + 1 if metrics.skipped == "no-signal" else 0
        rounds = self.rounds_without
        if rounds >= WARN_AFTER_ROUNDS and rounds & (rounds - 1) == 0:
            log.warning(
                "no learning signal: all answers to a task earn the same rounds_in_a_row=%d"
                " reward_mean=%.3f; %s",
                rounds,
                fmean(group.mean_reward for group in local),
                self._advise(local),
            )

    def _advise(self, local: Sequence[ScoredGroup]) -> str:
        """Return advice on the likely cause of answers without a signal."""
        limit = self._generation.max_completion_length
        cut = truncated_share(local, limit)
        closed = closed_share(local, is_closed)
        if cut > _MAJORITY:
            thinks = ", or set generation.thinking to off" if self._policy.template.thinks else ""
            return (
                f"{cut:.0%} of the answers were cut off at {limit} tokens: raise"
                f" generation.max_completion_length{thinks}"
            )
        if closed < 1 - _MAJORITY:
            return (
                f"{closed:.0%} of the answers closed their <answer> tag, asked in the form"
                f" {self._policy.form.name}: try another generation.form, or another model in"
                " model.name"
            )
        return (
            "if this continues, name easier tasks in environment.families (level: auto), or another"
            " model in model.name"
        )


def truncated_share(groups: Sequence[ScoredGroup], limit: int) -> float:
    """Return the share of our answers that were cut off at the token limit of the settings.

    Answers cut off at a shorter limit (`AnswerLength`) do not count: they are no reason to raise
    the limit of the settings.
    """
    sampled = [completion for group in groups for completion in group.sampled]
    return fmean([float(c.truncated and len(c.token_ids) >= limit) for c in sampled])
