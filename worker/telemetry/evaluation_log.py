"""Held-out evaluations of a node over its life: one line each in `evaluations.jsonl`.

The first line is of the untouched model if the node evaluated it before its first round.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from worker.errors import WorkerError
from worker.runtime.files import append_line
from worker.runtime.state_dir import StateDir


@dataclass(frozen=True, slots=True)
class FamilyScore:
    """Mean reward (with its interval of 95 %) and pass rates of one family at one level.

    `pass_1` is the probability that one answer is right, `pass_k` that at least one of `k` is.
    `level`: None for a family without a curriculum. `brier`: mean Brier score of the model's
    probabilities of right and wrong answers (0 best, 2 worst); None: not measured.
    """

    family: str
    level: int | None
    tasks: int
    reward: float
    reward_low: float
    reward_high: float
    pass_1: float
    pass_k: float
    k: int
    closed: float
    truncated: float
    brier: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The rewards of a policy on held-out tasks.

    `round`: the last round that it had trained, None for the untouched model. `reward`: the mean
    over families and levels, each with equal weight. `seconds`: the duration.
    """

    round: int | None
    rounds_trained: int
    finished_at: float
    seconds: float
    reward: float
    scores: tuple[FamilyScore, ...]


_EVALUATION = TypeAdapter(Evaluation)


def append(state_dir: Path, evaluation: Evaluation) -> None:
    """Add a line. Raises OSError if it can't be written."""
    append_line(StateDir(state_dir).evaluations, json.dumps(asdict(evaluation)))


def read(state_dir: Path) -> list[Evaluation]:
    """Return all evaluations, the oldest first; a last line that a crash truncated is ignored.

    Raises WorkerError for a file that a node can't have written.
    """
    file = StateDir(state_dir).evaluations
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    try:
        return [_EVALUATION.validate_json(line) for line in lines if line.endswith(b"\n")]
    except ValidationError as error:
        raise WorkerError(
            f"{file}: not a valid list of evaluations ({error.errors()[0]['msg']}); move it away"
        ) from None
