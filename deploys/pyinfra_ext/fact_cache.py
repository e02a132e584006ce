"""Cache facts per host: prefetched in one SSH command, invalidated by the first change.

pyinfra queries a host again for every fact of every operation, and each query needs a channel and a
shell over ssh. A run that changes nothing has about fifty queries; with this cache it needs two.
A cached answer is valid until the first command that is not a query.
"""

import secrets
import threading
from collections.abc import Iterable
from typing import Any

from paramiko import SSHException
from pyinfra.api import FactBase, StringCommand
from pyinfra.api.arguments import CONNECTOR_ARGUMENT_KEYS, pop_global_arguments
from pyinfra.api.host import Host
from pyinfra.connectors.util import CommandOutput, OutputLine

from deploys import locks, progress

# A fact, and the arguments of its command.
Question = tuple[type[FactBase[Any]], dict[str, Any]]

# Arguments of a query that do not affect its answer.
_IRRELEVANT = ("_timeout", "print_output", "print_input")

LOCK_SECONDS = 30
# Progress message about a slow command.
AT_IT = "still at it"

_memories: dict[str, "_Memory"] = {}


def ask_ahead(
    target: Host,
    questions: Iterable[Question],
) -> None:
    """Query the host for all these facts in one command, and cache its answers from now on.

    A fact without an answer is queried again when it is needed, and may fail then.
    """
    if target.name not in _memories:
        _memories[target.name] = _Memory(target)
    _memories[target.name].ask_ahead(questions)


def is_changed(target: Host) -> bool:
    """Return whether this run has begun to change the host."""
    return target.name in _memories and _memories[target.name].is_locked


def lock_before_changes(target: Host) -> None:
    """Lock the host (deploys/locks.py) from the first command that may change it until the end."""
    ask_ahead(target, [(locks.HostLock, {})])
    _memories[target.name].lock_before_changes()


def forget(target: Host) -> None:
    """Drop the cached answers of a host, because it may have changed otherwise."""
    if target.name in _memories:
        _memories[target.name].forget()


class _Memory:
    """Replaces a host's `get_fact` and its connector's `run_shell_command`."""

    def __init__(self, target: Host) -> None:
        self._host = target
        self._get_fact, self._run = target.get_fact, target.connector.run_shell_command
        self._answers: dict[str, CommandOutput] = {}
        self._wants_lock, self.is_locked = False, False
        self._as_locked: dict[str, Any] = {}
        # pyinfra has a greenlet for each host, and others may look at this one meanwhile.
        self._here = threading.local()
        target.get_fact, target.connector.run_shell_command = self._asked, self._told

    def forget(self) -> None:
        self._answers.clear()

    def lock_before_changes(self) -> None:
        if self._wants_lock:
            return
        self._wants_lock = True
        disconnect = self._host.disconnect

        def unlock() -> None:
            try:
                self._unlock()
            finally:
                disconnect()

        self._host.disconnect = unlock

    def _lock(
        self,
        arguments: dict[str, Any],
    ) -> tuple[bool, CommandOutput]:
        found = self._host.get_fact(locks.HostLock)
        abandoned = found if found and locks.is_abandoned(found) else None
        script = locks.take(abandoned, self._host.data.get(locks.BREAK) is True)
        self._as_locked = {
            key: value for key, value in arguments.items() if key not in ("_stdin", "_timeout")
        }
        done: tuple[bool, CommandOutput] = self._run(
            StringCommand(script), **self._as_locked, _timeout=LOCK_SECONDS
        )
        self.is_locked = done[0]
        return done

    def _unlock(self) -> None:
        """Release the lock. On a lost connection it stays; the next run from here breaks it."""
        if self.is_locked:
            try:
                self._run(StringCommand(locks.release()), **self._as_locked, _timeout=LOCK_SECONDS)
            except (TimeoutError, OSError, SSHException):
                return

    def ask_ahead(self, questions: Iterable[Question]) -> None:
        arguments = arguments_of_facts(self._host)
        texts = {_text(fact().command(**values)): None for fact, values in questions}
        new = [text for text in texts if _key(text, arguments) not in self._answers]
        if not new:
            return
        end = secrets.token_hex(8)
        script = "\n".join(f"( {text}\n); printf '\\n%s %s\\n' {end} $?" for text in new)
        try:
            _, output = self._run(StringCommand(script), **arguments)
        except (TimeoutError, OSError, SSHException):
            return
        for text, lines in zip(new, _answers(output.stdout_lines, end), strict=False):
            if lines is not None:
                self._answers[_key(text, arguments)] = CommandOutput(
                    [OutputLine("stdout", line) for line in lines]
                )

    def _asked(self, *arguments: Any, **values: Any) -> Any:
        """Replacement of get_fact."""
        was_asking = getattr(self._here, "is_asking", False)
        self._here.is_asking = True
        try:
            return self._get_fact(*arguments, **values)
        finally:
            self._here.is_asking = was_asking

    def _told(
        self,
        command: StringCommand | str,
        *display: Any,
        **arguments: Any,
    ) -> tuple[bool, CommandOutput]:
        """Replacement of run_shell_command."""
        if not getattr(self._here, "is_asking", False):
            if self._wants_lock and not self.is_locked:
                locked = self._lock(arguments)
                if not locked[0]:
                    return locked
            self.forget()
            with progress.waiting(f"{self._host.print_prefix}{AT_IT}"):
                done: tuple[bool, CommandOutput] = self._run(command, *display, **arguments)
            return done
        key = _key(_text(command), arguments)
        if key in self._answers:
            return True, self._answers[key]
        is_done, output = self._run(command, *display, **arguments)
        if is_done:
            self._answers[key] = output
        return is_done, output


def arguments_of_facts(target: Host) -> dict[str, Any]:
    """Return the arguments with which pyinfra runs facts on this host, such as sudo."""
    arguments, _ = pop_global_arguments(target.state, target, {})
    return {key: arguments[key] for key in CONNECTOR_ARGUMENT_KEYS if key in arguments}


def _text(command: StringCommand | str) -> str:
    return command if isinstance(command, str) else str(command.get_raw_value())


def _key(
    text: str,
    arguments: dict[str, Any],
) -> str:
    """Return the cache key: the command, and the arguments that may change its output."""
    how = {name: value for name, value in arguments.items() if value and name not in _IRRELEVANT}
    return f"{text}\0{sorted(how.items())!r}"


def _answers(
    lines: Iterable[str],
    end: str,
) -> Iterable[list[str] | None]:
    """Yield the output of each complete command; None for one that failed."""
    answer: list[str] = []
    for line in lines:
        if not line.startswith(end):
            answer.append(line)
            continue
        # The line break before the end mark is part of the mark.
        if answer and not answer[-1]:
            answer.pop()
        yield answer if line == f"{end} 0" else None
        answer = []
