"""Evaluate a node's policy on held-out tasks at intervals, and store the results."""

import logging
from collections.abc import Callable

from worker import evaluation
from worker.environments import Environment
from worker.policy.policy import Policy
from worker.settings import Settings
from worker.telemetry import evaluation_log
from worker.telemetry.status import NodeStatus

log = logging.getLogger(__name__)

EVAL_TASKS = 24
"""Number of held-out tasks per family and level, if `node.eval_seconds` allows that many."""


class HeldOut:
    """The evaluations of a node: every `node.eval_every_rounds` trained rounds.

    `status` has their rewards, including those from before a restart.
    """

    def __init__(
        self, settings: Settings, policy: Policy, environment: Environment, status: NodeStatus
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._environment = environment
        self._status = status
        self._last = -1  # rounds trained at the last evaluation
        self._see()

    def is_due(self) -> bool:
        """Return whether to evaluate now: before the first round, and at regular intervals."""
        every, trained = self._settings.node.eval_every_rounds, self._status.rounds_trained
        return every is not None and trained % every == 0 and trained != self._last

    def evaluate(self, progress: Callable[[], None]) -> None:
        """Evaluate, and add the result to the log; call `progress` from time to time."""
        trained = self._last = self._status.rounds_trained
        progress()
        found = evaluation.measure(
            self._policy,
            self._environment,
            self._settings.generation,
            evaluation.fixed_tasks(self._environment),
            EVAL_TASKS,
            seed=0,
            seconds=self._settings.node.eval_seconds,
            round=self._status.round if trained else None,
            rounds_trained=trained,
            progress=progress,
        )
        evaluation_log.append(self._settings.node.state_dir, found)
        self._see()
        log.info(
            "evaluated rounds_trained=%d reward=%.3f seconds=%.0f",
            trained,
            found.reward,
            found.seconds,
        )

    def _see(self) -> None:
        done = evaluation_log.read(self._settings.node.state_dir)
        if done:
            self._last = done[-1].rounds_trained
            self._status.held_out_before = done[0].reward
            self._status.held_out_now = done[-1].reward
