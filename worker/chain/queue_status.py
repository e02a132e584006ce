"""Counts of queues of transactions, and the file in which the account service keeps them.

The metrics endpoint of every process imports this module, so it does not import web3.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from worker.runtime import status_file

STATUS_FILE = "queues.json"


@dataclass(frozen=True, slots=True)
class QueueState:
    """Counts of a queue, or of several.

    `waiting`: signed and not accepted by a node; `sent`: accepted and not mined; `oldest_at`: when
    the oldest of both arrived (Unix time), None if there are none; `failed`: calls that were given
    up or refused since the start; `last_error`: the last error, also one after which a transaction
    still waits, and `last_error_at` its time.
    """

    waiting: int = 0
    sent: int = 0
    oldest_at: float | None = None
    failed: int = 0
    last_error: str | None = None
    last_error_at: float | None = None

    def __add__(self, other: "QueueState") -> "QueueState":
        times = [at for at in (self.oldest_at, other.oldest_at) if at is not None]
        latest = max(self, other, key=lambda each: each.last_error_at or 0.0)
        return QueueState(
            self.waiting + other.waiting,
            self.sent + other.sent,
            min(times, default=None),
            self.failed + other.failed,
            latest.last_error,
            latest.last_error_at,
        )


@dataclass(frozen=True, slots=True)
class QueuesStatus:
    """All queues together, as of `updated_at` (Unix time): `STATE_DIR/queues.json`."""

    updated_at: float
    queues: QueueState


_STATUS = TypeAdapter(QueuesStatus)


def read_status(state_dir: Path) -> QueuesStatus | None:
    """Return the last status that the account service wrote; None: none. Raises WorkerError."""
    file = state_dir / STATUS_FILE
    return status_file.read(file, _STATUS, "the state of queues", "account service")
