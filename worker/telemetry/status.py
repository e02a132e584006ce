"""What a node says of itself: `status.json` (now) and `rounds.jsonl` (one line a round), in its state folder.

`hivewright status`, the demo's table, the fleet's table and the dashboard all read these two files, so they agree.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from worker.errors import WorkerError

SwarmState = Literal["starting", "connected", "training-alone", "stopped"]
ChainState = Literal["none", "unknown", "ok", "unreachable"]


@dataclass(slots=True)
class NodeStatus:
    """The state of a worker. Means are over the last round; None means that there was none yet."""

    name: str
    peer_id: str
    animal_name: str
    model: str
    version: str
    pid: int = field(default_factory=os.getpid)
    state: SwarmState = "starting"
    activity: str = "starting"
    chain: ChainState = "none"
    round: int | None = None
    rounds_trained: int = 0
    practice_steps: int = 0
    reward_mean: float | None = None
    loss: float | None = None
    peers_known: int = 0
    peers_heard: int = 0
    groups_local: int = 0
    groups_external: int = 0
    groups_rejected: dict[str, int] = field(default_factory=dict)
    tokens_per_second: float | None = None
    round_seconds: float | None = None
    ledger: dict[str, int] = field(default_factory=dict)
    last_error: str | None = None
    updated_at: float = 0.0

    def write(self, state_dir: Path) -> None:
        """Replace `status.json` at once: a reader sees the old or the new one, never half of it."""
        self.updated_at = time.time()
        temporary = state_dir / "status.json.new"
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(state_dir / "status.json")


def read(state_dir: Path) -> NodeStatus | None:
    """The node's last word. None: it never started. Raises WorkerError if the file is not ours."""
    file = state_dir / "status.json"
    try:
        raw = json.loads(file.read_text())
        return NodeStatus(**{f.name: raw[f.name] for f in fields(NodeStatus)})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise WorkerError(
            f"{file}: {error}; expected what a worker of this version writes; start the worker again"
        ) from None


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One line of `rounds.jsonl`: what one round came to. `skipped`: why no optimizer step was made, else None."""

    round: int
    finished_at: float
    reward_mean: float
    loss: float
    grad_norm: float
    peers_heard: tuple[str, ...]
    groups_local: int
    groups_external: int
    groups_rejected: dict[str, int]
    groups_dropped: dict[str, int]
    tokens_per_second: float
    seconds: float
    skipped: str | None

    def append(self, state_dir: Path) -> None:
        with (state_dir / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(asdict(self)) + "\n")


def read_rounds(state_dir: Path) -> list[dict[str, Any]]:
    """All rounds that the node finished, oldest first. A last line that a crash cut short is left out."""
    try:
        lines = (state_dir / "rounds.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]
