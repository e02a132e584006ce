"""Limit the length of answers to about twice that of the model's closed answers.

A model that has learned to answer in 20 tokens still runs to the full limit whenever it does not
close its answer, and such answers, which earn nothing, take most of a round's time and memory. So
answers are cut at twice the 95th percentile of the lengths of closed answers in the last rounds,
never above `generation.max_completion_length`. If closed answers become longer, the limit rises.
"""

from collections import deque
from collections.abc import Sequence

from worker import settings
from worker.environments.answers import is_closed
from worker.records import ScoredGroup

ROUNDS = 4
"""Number of rounds whose closed answers count."""
ENOUGH = 16
"""With fewer closed answers the limit is the full one."""
_QUANTILE = 0.95
_HEADROOM = 2.0
_SHORTEST, _STEP = 32, 16  # tokens


class AnswerLength:
    """The limit for the answers of the next round.

    It is not saved: the first round after a start has the full limit.
    """

    def __init__(self) -> None:
        self._closed: deque[list[int]] = deque(maxlen=ROUNDS)

    def see(self, groups: Sequence[ScoredGroup]) -> None:
        """Record the local answers of a round."""
        self._closed.append(
            [
                len(rollout.sampled.token_ids)
                for group in groups
                for rollout in group.rollouts
                if rollout.sampled is not None and is_closed(rollout.text)
            ]
        )

    def limit(self, generation: settings.Generation) -> int:
        """Return the limit in tokens: a multiple of 16, or the limit in the settings."""
        closed = sorted(length for lengths in self._closed for length in lengths)
        if generation.completion_length == "max" or len(closed) < ENOUGH:
            return generation.max_completion_length
        usual = closed[int(_QUANTILE * (len(closed) - 1))]
        wanted = _STEP * -(-int(_HEADROOM * usual) // _STEP)
        return min(max(_SHORTEST, wanted), generation.max_completion_length)

    def apply(self, generation: settings.Generation) -> settings.Generation:
        """Return the settings for the generation of the next round."""
        return generation.model_copy(update={"max_completion_length": self.limit(generation)})
