"""All errors that hivewright raises on purpose, as one tree; each class has its exit code.

    WorkerError                      1   anything that has no code of its own
    ├── SettingsError (ValueError)   2   invalid settings, inventory data or command line
    │   └── SecretError                  a file that should have a key, token or password
    ├── IdentityError                3   key missing, unreadable, or used by another node
    ├── ResourceError (OSError)      4   the machine lacks something: a free port, disk space
    │   └── DeviceIll               11   the GPU has a fault that needs a person
    ├── ModelError                   5   the model can't be loaded or does not fit
    ├── NotScored                        the model has no opinion on a question; no command ends so
    ├── ChainError                   6   the chain refuses, or is not the one in the settings
    │   ├── ChainUnreachable             no answer in time: workers wait, other commands fail
    │   │   └── BadAnswer                an unusable answer; treated like an outage
    │   └── ContractRefused              the contract answered with a named error
    ├── SwarmError                   7   the peer-to-peer part can't go on
    │   └── BadRecord (ValueError)       a peer sent invalid data; never leaves the exchange
    ├── TrainingError                8   the trainer can't go on (N non-finite steps in a row)
    ├── DemoFailed                   9   the demo ended and a condition that it checks failed
    └── ReleaseRefused              10   a rollout's gate stayed closed; the rollout was undone

A message is one line: the value, where it came from, what was expected, what to do. The codes are
in docs/operations/repair.md. 2, 3, 5 and 11 need a human, so the systemd units do not restart after
them.
"""

from collections.abc import Sequence
from typing import Self


class WorkerError(Exception):
    """Root of all errors that hivewright raises on purpose."""

    exit_code = 1


class SettingsError(WorkerError, ValueError):
    """Invalid settings, inventory data or command line.

    `mistakes`: each of them, if there are several.
    """

    exit_code = 2
    mistakes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        source: str,
        mistakes: Sequence[str],
    ) -> Self:
        """Return one error that lists all mistakes in `source`."""
        error = cls(f"{source}: " + "; ".join(mistakes))
        if len(mistakes) > 1:
            error.mistakes = tuple(f"{source}: {mistake}" for mistake in mistakes)
        return error


class SecretError(SettingsError):
    """A file does not contain the one line with a key, token or password that it should."""


class IdentityError(WorkerError):
    """The node's key is missing, unreadable, or belongs to another node."""

    exit_code = 3


class ResourceError(WorkerError, OSError):
    """The machine lacks something that the role needs."""

    exit_code = 4


class DeviceIll(ResourceError):
    """The GPU has a fault that a restart of the program does not fix."""

    exit_code = 11


class ModelError(WorkerError):
    """The model can't be found, loaded, or does not fit this machine."""

    exit_code = 5


class NotScored(WorkerError):
    """The model can't score a question's choices within the limits of length, time and memory."""


class ChainError(WorkerError):
    """The chain refuses, or is not the one that the settings name."""

    exit_code = 6


class ChainUnreachable(ChainError):
    """The chain or the account service gave no answer in time."""


class BadAnswer(ChainUnreachable):
    """The chain answered with an internal error, or in an unexpected form.

    Servers behind a public address do that sometimes (an HTML page, "header not found"), so a role
    waits.
    """


class ContractRefused(ChainError):
    """The contract answered with a named error; `name` is that name, as in the ABI."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class SwarmError(WorkerError):
    """The peer-to-peer part can't go on."""

    exit_code = 7


class BadRecord(SwarmError, ValueError):
    """A peer sent something invalid.

    `reason` is a short fixed word for counters; the message is for people.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TrainingError(WorkerError):
    """The trainer can't go on."""

    exit_code = 8


class DemoFailed(WorkerError):
    """The demo ended, and a condition that it checks failed."""

    exit_code = 9


class ReleaseRefused(WorkerError):
    """A rollout's gate did not let the release through; the rollout was undone."""

    exit_code = 10
