"""A node's status: `status.json` (now) and `rounds.jsonl` (one line for each part of a round).

Both are in its state folder. `hivewright status`, the demo's table and `hivewright fleet status`
read these two files, so they agree.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from worker.errors import ResourceError, WorkerError
from worker.hub.hub import HubStatus
from worker.log import discreet
from worker.runtime.files import append_line, write_whole
from worker.runtime.gpu_health import Card
from worker.runtime.processes import is_running
from worker.runtime.state_dir import StateDir
from worker.swarm.status import SwarmStatus

log = logging.getLogger(__name__)

NodeState = Literal[
    "starting", "connected", "training-alone", "catching-up", "stopped", "failed", "died"
]
"""The swarm's state (worker/swarm/status.py), or how the node ended.

`failed`: ended with the error in `last_error`. `died`: the process is gone without a final status;
only a reader detects that.
"""
ChainState = Literal["none", "unknown", "ok", "unreachable"]


@dataclass(slots=True)
class Recent:
    """Means over the last `rounds` rounds, practice included; None: measured in none of them.

    `truncated`: share of our answers that were cut off; `closed`: share that closed their <answer>
    tag; `no_signal`: share of our groups whose answers all earn the same; `sampling_gap`: mean
    difference of a token's log-probability between trainer and sampler, in nats. `alone`: share of
    the rounds in which no peer answered; `reward`: mean reward; `reward_before`: mean reward of the
    rounds before these, None if they are too few. `seconds_by`: seconds per round by activity
    (worker/telemetry/stopwatch.py).
    """

    rounds: int = 0
    truncated: float | None = None
    closed: float | None = None
    no_signal: float | None = None
    sampling_gap: float | None = None
    alone: float | None = None
    reward: float | None = None
    reward_before: float | None = None
    seconds_by: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Condition:
    """Figures from which a node's health is determined (worker/telemetry/health.py).

    `unused_gpus`: GPUs that the driver lists while `model.device: auto` chose the CPU. `precision`:
    the type of the weights. `engine`: the generation engine and its type; `setbacks`: why a
    preferred "engine" or "precision" is not used. `template`: whether the model has a chat
    template. `clock_offset`: seconds that this clock is ahead of the account service's.
    `disk_spare_mb`: free space beyond node.min_free_disk_mb, and `ram_available_mb`: the host's
    available memory, both in 10^6 bytes. `memory_stalled`: share of the last minute in which
    programs waited for memory. `answers_share`: share of a round's answers that are generated at
    once. `training_tokens`: tokens of a micro-batch; `training_share`: their share of the number
    that was measured to fit; `recomputes`: layers are recomputed to save memory, though that was
    not needed when it was measured. `gpu`: the GPU that has the model. None: unknown or not
    applicable.
    """

    unused_gpus: int = 0
    precision: str | None = None
    engine: str | None = None
    setbacks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    template: str | None = None
    clock_offset: float | None = None
    disk_spare_mb: int | None = None
    ram_available_mb: int | None = None
    memory_stalled: float | None = None
    answers_share: float | None = None
    training_tokens: int | None = None
    training_share: float | None = None
    recomputes: bool = False
    gpu: Card | None = None
    recent: Recent = field(default_factory=Recent)


@dataclass(frozen=True, slots=True)
class Finding:
    """A check (`health.CHECKS`) that is past its threshold.

    `severe`: an operator should look at it now.
    """

    check: str
    severity: Literal["warning", "severe"]
    text: str


@dataclass(frozen=True, slots=True)
class FamilyReward:
    """Rewards of a round's own groups of one family at one level.

    `reward` is their mean, `reward_std` the unbiased standard deviation over their answers, and
    `frac_reward_zero_std` the share of groups without a signal. `level`: None without a curriculum.
    """

    family: str
    level: int | None
    groups: int
    reward: float
    reward_std: float
    frac_reward_zero_std: float


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One line of `rounds.jsonl`: the result of one training step, on one or more parts of a round.

    `skipped`: why no optimizer step was made; None: one was made. `quality`: figures of the step
    with TRL's names (`records.StepQuality`); empty in lines of versions before it. `closed` and
    `truncated`: shares of our answers that closed their tag, and that were cut off at the maximum
    length.
    `seconds_waiting`: the part of `seconds` in which the node only waited for its peers.
    `seconds_by`: seconds by activity since the last line, which includes the wait for this round.
    `learning_rate`: that of the step, 0 if there was none. `external_share`: share of peers' groups
    among those trained on. `families`: rewards of our own groups by family and level. `held_out`:
    mean reward of the last evaluation on held-out tasks, None without one. `part`: 0, or the number
    of a further part of the round, which is not rewarded (records.Place). `parts`: number of parts,
    from `part` on, that the step learned from; `reward_mean` is of the first of them, as on the
    chain. `behind`: number of peers' groups that arrived, by the number of rounds that they are
    older than this one.
    """

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
    quality: dict[str, float | None] = field(default_factory=dict)
    closed: float | None = None
    truncated: float | None = None
    seconds_waiting: float = 0.0
    seconds_by: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0
    external_share: float = 0.0
    families: tuple[FamilyReward, ...] = ()
    held_out: float | None = None
    part: int = 0
    parts: int = 1
    behind: dict[int, int] = field(default_factory=dict)

    def append(self, state_dir: Path) -> None:
        """Add the line. Raises ResourceError."""
        path = StateDir(state_dir).rounds
        with _named(path):
            append_line(path, json.dumps(asdict(self)))


@dataclass(slots=True)
class NodeStatus:
    """The state of a worker. Means are over the last part; None: no part has ended yet.

    `device`: the device of its model, such as cuda:0; None: not loaded yet. `held_out_before`,
    `held_out_now`: mean reward on held-out tasks of the untouched model, and of the last
    evaluation. `environments`: names and versions of the task sources. `levels`: curriculum level
    by family. `form`: the prompt form. `swarm`: the exchange with its peers; None: disabled, or not
    yet started. `ledger`: number of rewards by state; "held-back": earned, but not due to be sent
    yet. `extra_steps` and `extra_groups`: numbers of training steps and own groups in further parts
    of rounds; `groups_behind`: number of peers' groups that arrived, by the number of rounds that
    they were older than ours. `market`: number of bets by state, and `brier`, the mean Brier score
    of the model's probabilities; `market_brier`: that score by task family. Both are empty without
    a prediction market. `ledger_error`: why rewards wait in the ledger, None if they do not.
    `last_round`: the last line of its history. `warnings`: checks that are past their threshold.
    `weights`: number of sets "offered" to peers, and of peers' sets "fetched", "unusable", "worse"
    than ours, and "taken".
    """

    name: str
    peer_id: str
    animal_name: str
    model: str
    version: str
    pid: int = field(default_factory=os.getpid)
    state: NodeState = "starting"
    device: str | None = None
    activity: str = "starting"
    chain: ChainState = "none"
    round: int | None = None
    rounds_trained: int = 0
    practice_steps: int = 0
    extra_steps: int = 0
    extra_groups: int = 0
    groups_behind: dict[int, int] = field(default_factory=dict)
    reward_mean: float | None = None
    loss: float | None = None
    peers_heard: int = 0
    groups_local: int = 0
    groups_external: int = 0
    tokens_per_second: float | None = None
    round_seconds: float | None = None
    waiting_seconds: float | None = None
    ledger: dict[str, int] = field(default_factory=dict)
    environments: tuple[str, ...] = ()
    levels: dict[str, int] = field(default_factory=dict)
    form: str | None = None
    held_out_before: float | None = None
    held_out_now: float | None = None
    closed: float | None = None
    truncated: float | None = None
    swarm: SwarmStatus | None = None
    hub: HubStatus | None = None
    ledger_error: str | None = None
    market: dict[str, float] = field(default_factory=dict)
    market_brier: dict[str, float] = field(default_factory=dict)
    last_error: str | None = None
    last_round: RoundRecord | None = None
    condition: Condition = field(default_factory=Condition)
    warnings: tuple[Finding, ...] = ()
    weights: dict[str, int] = field(default_factory=dict)
    updated_at: float = 0.0

    def write(self, state_dir: Path) -> None:
        """Replace `status.json` atomically."""
        self.updated_at = time.time()
        write_whole(StateDir(state_dir).status, json.dumps(asdict(self)), durable=False)


_STATUS = TypeAdapter(NodeStatus)


def read(state_dir: Path) -> NodeStatus | None:
    """Return a node's current status, or its last one if it has ended. None: it never started.

    Call it on the node's own machine: it checks whether the process still runs. Raises WorkerError
    if the file is invalid.
    """
    file = StateDir(state_dir).status
    try:
        node = _STATUS.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise WorkerError(
            f"{file}: not a status of this version ({_first(error)}); restart the worker"
        ) from None
    if node.state not in ("stopped", "failed") and not is_running(node.pid):
        node.state = "died"
    return node


def write_failure(state_dir: Path, error: WorkerError) -> None:
    """Write the final status of a node that can't go on; nothing if it never had a status.

    If the status can't be read or written, that is logged, not raised: `error` must end the node.
    """
    try:
        node = read(state_dir)
        if node is not None:
            node.pid = os.getpid()
            node.state = "failed"
            node.activity = "stopped"
            node.last_error = discreet(str(error))
            node.write(state_dir)
    except WorkerError as unwritten:
        log.warning("final status not written error=%s", unwritten)


_RECORD = TypeAdapter(RoundRecord)


def as_record(line: dict[str, Any]) -> RoundRecord:
    """Return a line of the history, also of an earlier version, as a record.

    Raises ValueError if it is not a round.
    """
    return _RECORD.validate_python(line)


def complete_rounds(
    state_dir: Path,
    record: dict[str, Any],
) -> None:
    """Add the round that a checkpoint contains, if a crash came before its line was written.

    Raises ValueError if it is not a round.
    """
    last = as_record(record)
    if (last.round, last.part) not in map(_place_of, read_parts(state_dir)):
        last.append(state_dir)


def read_rounds(state_dir: Path) -> list[dict[str, Any]]:
    """Return all rounds that the node finished, oldest first: the first part of each."""
    return [record for record in read_parts(state_dir) if not record.get("part")]


def read_parts(state_dir: Path) -> list[dict[str, Any]]:
    """Return all parts of all rounds, oldest first, without a truncated last line.

    A part that was repeated from the checkpoint before it has two lines; the later one is
    returned. Raises WorkerError for a file that a node can't have written.
    """
    records, _ = read_lines(state_dir, 0)
    return list({_place_of(record): record for record in records}.values())


def read_lines(
    state_dir: Path,
    position: int,
) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of the history from byte `position` on, and the position after them.

    A truncated last line is left for the next call. Raises WorkerError for a file that a node can't
    have written.
    """
    file = StateDir(state_dir).rounds
    try:
        with file.open("rb") as stream:
            stream.seek(position)
            lines = stream.read().splitlines(keepends=True)
    except FileNotFoundError:
        return [], position
    records = []
    where = f"{file}: after byte {position}" if position else f"{file}"
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            hash(_place_of(record))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise WorkerError(
                f"{where}: line {number} is not of a round; remove that line, or move the file away"
            ) from None
        records.append(record)
        position += len(line)
    return records, position


def _place_of(record: dict[str, Any]) -> tuple[int, int]:
    return record["round"], record.get("part", 0)  # lines of earlier versions have no part


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn an OSError into a ResourceError that names the file."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path}: can't be written: {error.strerror}; make room or rights, then start again"
        ) from None


def _first(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    first = error.errors()[0]
    return f"{'/'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
