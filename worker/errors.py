"""Everything that can go wrong, as one tree. The exit code is on the class.

    WorkerError                      1   anything that has no code of its own
    ├── SettingsError (ValueError)   2   settings, inventory data or a command line that can't be right
    │   └── SecretError                  a file with a key, token or password that is not one
    ├── IdentityError                3   key missing, unreadable, or used by somebody else
    ├── ResourceError (OSError)      4   the machine lacks something: a free port, disk space
    ├── ModelError                   5   the model can't be had or does not fit
    ├── ChainError                   6   the chain refuses, or is not the one that the settings name
    │   ├── ChainUnreachable             no answer in time; a state for a worker, an error for a one-off command
    │   │   └── BadAnswer                an answer that is of no use; may pass, so it is waited for like an outage
    │   └── ContractRefused              the contract answered with a named error
    ├── SwarmError                   7   the peer-to-peer part can't go on
    │   └── BadRecord (ValueError)       what a peer sent is invalid; never leaves the exchange
    ├── TrainingError                8   the trainer can't go on (N non-finite steps in a row, say)
    ├── DemoFailed                   9   the demo ended, and something that it promises was invalid
    └── ReleaseRefused              10   a rollout's gate stayed closed, and what it had touched went back

A message is one line: the value, where it came from, what was expected, what to do. The codes are
in docs/operations/repair.md. 2, 3 and 5 need a human, so the systemd units do not restart after
them.
"""

from collections.abc import Sequence
from typing import Self


class WorkerError(Exception):
    """Root of all errors that hivewright raises on purpose."""

    exit_code = 1


class SettingsError(WorkerError, ValueError):
    """Settings, inventory data or a command line that can't be right. `mistakes`: each of them,
    where it is several."""

    exit_code = 2
    mistakes: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: str, mistakes: Sequence[str]) -> Self:
        """Everything that is wrong with `source`."""
        error = cls(f"{source}: " + "; ".join(mistakes))
        if len(mistakes) > 1:
            error.mistakes = tuple(f"{source}: {mistake}" for mistake in mistakes)
        return error


class SecretError(SettingsError):
    """A file that should have one line with a key, token or password, and has not."""


class IdentityError(WorkerError):
    """The node's key is missing, unreadable, or belongs to somebody else."""

    exit_code = 3


class ResourceError(WorkerError, OSError):
    """The machine lacks something that the role needs."""

    exit_code = 4


class ModelError(WorkerError):
    """The model can't be found, loaded, or does not fit this machine."""

    exit_code = 5


class ChainError(WorkerError):
    """The chain refuses, or is not the one that the settings name."""

    exit_code = 6


class ChainUnreachable(ChainError):
    """The chain or the account service gave no answer in time."""


class BadAnswer(ChainUnreachable):
    """The chain answered with an error of its own, or not in the form of the method's answers.

    Nodes behind a public address do that now and then (a page in HTML, "header not found"), so a
    role waits.
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
    """A peer sent something invalid. `reason` is a short fixed word for counters, the message is
    for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TrainingError(WorkerError):
    """The trainer can't go on."""

    exit_code = 8


class DemoFailed(WorkerError):
    """The demo ended, and something that it promises was invalid."""

    exit_code = 9


class ReleaseRefused(WorkerError):
    """A rollout's gate did not let the release through; what had been touched went back."""

    exit_code = 10
