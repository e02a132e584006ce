"""The status file of the keeper.

The metrics endpoint of every process imports this module, so it does not import web3.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from worker.runtime import status_file

STATUS_FILE = "status.json"

State = Literal["starting", "chain-unreachable", "waiting-for-peers", "round-open", "stopped"]


@dataclass(frozen=True, slots=True)
class Status:
    """The content of `<keeper.state_dir>/status.json`. `began_at`: seconds since 1970.

    `reporters` peers reported in `round`; `expected` is the number of peers that it waits for.
    `limit_seconds`: `keeper.round_seconds`. `problem`: why the chain could not be read, or why the
    last transaction failed; None: no problem.
    """

    state: State = "starting"
    round: int | None = None
    reporters: int = 0
    expected: int = 0
    began_at: float | None = None
    limit_seconds: float | None = None
    problem: str | None = None


_STATUS = TypeAdapter(Status)


def read_status(state_dir: Path) -> Status | None:
    """Return the keeper's last status, None before the first. Raises WorkerError if invalid."""
    file = state_dir / STATUS_FILE
    return status_file.read(file, _STATUS, "a keeper's status", "keeper")
