"""A readable log on disk of every group that a node sampled or trained on.

`STATE/answers/round-00000012.jsonl.zst` has one JSON object per line, for one group each. The
oldest rounds are removed when there are more than `node.answers_rounds` of them or they take more
than `node.answers_mb`. Texts of peers are stored unchanged, as JSON; a reader that shows them must
escape control characters (`worker.log.printable`).
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import zstandard
from pydantic import Field, TypeAdapter, ValidationError

from worker.errors import WorkerError
from worker.records import ScoredGroup
from worker.runtime.files import write_whole
from worker.runtime.outage import Outage
from worker.runtime.state_dir import StateDir

log = logging.getLogger(__name__)

_PREFIX, _SUFFIX = "round-", ".jsonl.zst"
_ZSTD_LEVEL = 6
_LARGEST_ROUND = 1 << 28
"""Bytes of a round, decompressed, that a reader accepts, in case the file is damaged."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion of a group.

    `advantage`: its weight in training; 0 if it was not trained on. `logprob`: mean log-probability
    of its tokens under this node's policy; None if it was not computed. `truncated`: cut off at the
    maximum length; None for a peer's, whose text does not show it.
    """

    text: str
    reward: float
    advantage: float = 0.0
    logprob: float | None = None
    truncated: bool | None = None


@dataclass(frozen=True, slots=True)
class AnsweredGroup:
    """All answers of one node to one task of a round.

    `right`: one right answer, None if the environment has none. `level`: of the family's
    curriculum, None without one. `form`: name of the prompt form. `peer_id`: the node that
    answered, None for this one. `trained`: whether this node trained on it.
    """

    round: int
    family: str
    level: int | None
    form: str
    peer_id: str | None
    trained: bool
    question: str
    right: str | None
    answers: Annotated[tuple[Answer, ...], Field(min_length=1)]

    @property
    def mean_reward(self) -> float:
        return sum(answer.reward for answer in self.answers) / len(self.answers)

    @property
    def best(self) -> Answer:
        return max(self.answers, key=lambda answer: answer.reward)

    @property
    def worst(self) -> Answer:
        return min(self.answers, key=lambda answer: answer.reward)


_GROUP = TypeAdapter(AnsweredGroup)


class AnswerLog:
    """Writes rounds to `state_dir`, within limits. A full or broken disk does not stop the node."""

    def __init__(
        self,
        state_dir: Path,
        max_rounds: int,
        max_megabytes: int,
    ) -> None:
        self._folder = StateDir(state_dir).answers
        self._max_rounds = max_rounds
        self._max_bytes = max_megabytes * 1_000_000
        self._outage = Outage(log)

    def write(
        self,
        round: int,
        groups: Sequence[AnsweredGroup],
    ) -> None:
        """Write a round, replacing an earlier attempt at it.

        A failure is logged once, and so is the next success.
        """
        if self._max_rounds == 0 or not groups:
            return
        try:
            self._write(round, groups)
        except OSError as error:
            self._outage.begin(
                "answers of this round not written, training continues error=%s;"
                " free space on that disk, or lower node.answers_mb",
                error,
            )
        else:
            self._outage.end("answers are written again folder=%s", self._folder)

    def _write(
        self,
        round: int,
        groups: Sequence[AnsweredGroup],
    ) -> None:
        self._folder.mkdir(exist_ok=True)
        self._make_room()
        lines = "".join(json.dumps(asdict(group)) + "\n" for group in groups)
        file = self._folder / f"{_PREFIX}{round:08d}{_SUFFIX}"
        write_whole(file, zstandard.compress(lines.encode(), _ZSTD_LEVEL), durable=False)
        self._make_room()

    def _make_room(self) -> None:
        """Remove the oldest rounds until both limits are kept."""
        for unfinished in self._folder.glob(f".{_PREFIX}*"):  # of a process that was killed
            unfinished.unlink(missing_ok=True)
        files = _files(self._folder)
        sizes = [file.stat().st_size for file in files]
        while files and (len(files) > self._max_rounds or sum(sizes) > self._max_bytes):
            files.pop(0).unlink(missing_ok=True)
            sizes.pop(0)


def read(
    state_dir: Path,
    first: int = 0,
    last: int | None = None,
) -> Iterator[AnsweredGroup]:
    """Yield the groups of rounds `first` to `last` (None: the newest), the newest round first.

    Raises WorkerError for a file that a node can't have written.
    """
    for file in reversed(_files(StateDir(state_dir).answers)):
        round = int(_number_of(file))
        if round >= first and (last is None or round <= last):
            yield from _read_round(file)


def _read_round(file: Path) -> list[AnsweredGroup]:
    try:
        data = _decompress(file.read_bytes())
        return [_GROUP.validate_json(line) for line in data.splitlines()]
    except FileNotFoundError:  # the node has removed it since
        return []
    except (zstandard.ZstdError, ValidationError) as error:
        raise WorkerError(
            f"{file}: not a valid round of answers ({str(error).splitlines()[0]}); remove it"
        ) from None


def _decompress(data: bytes) -> bytes:
    # The decompressor allocates what the header claims, whatever its limit is.
    if zstandard.get_frame_parameters(data).content_size > _LARGEST_ROUND:
        raise zstandard.ZstdError(f"claims more than {_LARGEST_ROUND} decompressed bytes")
    return zstandard.ZstdDecompressor().decompress(
        data, max_output_size=_LARGEST_ROUND, allow_extra_data=False
    )


def _files(folder: Path) -> list[Path]:
    """Return finished rounds, the oldest first."""
    files = folder.glob(f"{_PREFIX}*{_SUFFIX}")
    return sorted(file for file in files if _number_of(file).isdecimal())


def _number_of(file: Path) -> str:
    return file.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)


def of_group(
    group: ScoredGroup,
    round: int,
    *,
    level: int | None,
    form: str,
    right: str | None,
    advantages: Sequence[float],
    logprobs: Sequence[float | None],
    trained: bool,
) -> AnsweredGroup:
    """Return the record of a scored group.

    `advantages` and `logprobs` have one value for each completion.
    """
    answers = [
        Answer(
            one.text, one.reward, advantage, logprob, one.sampled.truncated if one.sampled else None
        )
        for one, advantage, logprob in zip(group.rollouts, advantages, logprobs, strict=True)
    ]
    return AnsweredGroup(
        round=round,
        family=group.task.family,
        level=level,
        form=form,
        peer_id=group.peer_id,
        trained=trained,
        question=group.question,
        right=right,
        answers=tuple(answers),
    )
