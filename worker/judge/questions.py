"""Ask tasks as evaluation questions, and score one answer to each."""

import secrets
import threading
from collections import OrderedDict

from worker.environments import Environment
from worker.environments.answers import extract_answer, tagged
from worker.records import Task

MAX_SESSIONS = 4096
"""Number of questions that may be open at once; the oldest is dropped for a new one."""
MAX_ANSWER = 8192
"""Longest answer, in characters."""


class Questions:
    """Tasks of an environment, each for one session. Safe for use by several threads."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._open: OrderedDict[str, Task] = OrderedDict()
        self._lock = threading.Lock()

    def ask(self) -> tuple[str, str]:
        """Return a new session and its question."""
        (task,) = self._environment.sample(secrets.randbits(31), 1)
        session = secrets.token_hex(16)
        with self._lock:
            self._open[session] = task
            if len(self._open) > MAX_SESSIONS:
                self._open.popitem(last=False)
        return session, self._environment.question(task)

    def score(
        self,
        session: str,
        answer: str,
    ) -> float | None:
        """Return the reward of the session's only answer; None: there is no such session.

        The answer may be bare, or in a text with answer tags.
        """
        with self._lock:
            task = self._open.pop(session, None)
        if task is None:
            return None
        text = answer if extract_answer(answer) is not None else tagged(answer)
        return self._environment.score(task, [text])[0]
