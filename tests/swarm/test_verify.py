"""A peer's group counts only with its own task, a valid size, and our scorer's rewards."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from worker import settings
from worker.errors import BadRecord
from worker.records import Group, Task, round_seed
from worker.swarm.exchange.verify import Verifier

PEER, ROUND = "QmPeer", 12
SEED = round_seed(PEER, ROUND)


class Sums:
    """Answers "SEED+INDEX" exactly."""

    versions = ("sums 1",)
    families = ("sum x",)

    def question(self, task: Task) -> str:
        if task.family != "sum":
            raise BadRecord("unknown-task", f"{task.family} is not in the mix")
        return f"{task.seed}+{task.index}?"

    def score(self, task: Task, completions: Sequence[str]) -> list[float]:
        return [1.0 if c == str(task.seed + task.index) else 0.0 for c in completions]


def verifier(tasks: object = None, **swarm: int) -> Verifier:
    return Verifier(
        tasks or Sums(), settings.Swarm(max_groups_per_peer=4, max_completion_bytes=40, **swarm), 3
    )  # type: ignore[arg-type]


GOOD = Group(Task("sum", "x", SEED, 1), (str(SEED + 1), "no idea"))


def test_good_group_is_scored_here() -> None:
    scored = verifier().verify(PEER, ROUND, GOOD)
    assert scored.question == f"{SEED}+1?"
    assert scored.rewards == (1.0, 0.0)
    assert scored.peer_id == PEER
    assert scored.sampled == ()


@pytest.mark.parametrize(
    ("reason", "group"),
    [
        ("seed", replace(GOOD, task=replace(GOOD.task, seed=SEED + 1))),
        ("seed", replace(GOOD, task=replace(GOOD.task, seed=round_seed(PEER, ROUND - 1)))),
        ("seed", replace(GOOD, task=replace(GOOD.task, seed=round_seed("QmOther", ROUND)))),
        ("index", replace(GOOD, task=replace(GOOD.task, index=4))),
        ("num-completions", replace(GOOD, completions=("alone",))),
        ("num-completions", replace(GOOD, completions=())),
        ("num-completions", replace(GOOD, completions=("a", "b", "c", "d"))),
        ("too-long", replace(GOOD, completions=("a", "b" * 41))),
        ("too-long", replace(GOOD, completions=("a", "\u00e9" * 21))),
        ("unknown-task", replace(GOOD, task=replace(GOOD.task, family="poetry"))),
    ],
)
def test_bad_group_is_refused_with_its_reason(reason: str, group: Group) -> None:
    with pytest.raises(BadRecord) as caught:
        verifier().verify(PEER, ROUND, group)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "scores", [[1.0], [1.0, 2.0], [0.0, -0.1], [math.nan, 0.0], [math.inf, 0.0]]
)
def test_scores_that_are_none_are_refused(scores: list[float]) -> None:
    class Odd(Sums):
        def score(self, task: Task, completions: Sequence[str]) -> list[float]:
            return scores

    with pytest.raises(BadRecord) as caught:
        verifier(Odd()).verify(PEER, ROUND, GOOD)
    assert caught.value.reason == "score"


def test_further_parts_have_indices_of_their_own() -> None:
    of_part = replace(GOOD, task=replace(GOOD.task, index=2 * 256 + 3), completions=("a", "b"))
    assert verifier().verify(PEER, ROUND, of_part, part=2).rewards == (0.0, 0.0)
    for part in (0, 1, 3):
        with pytest.raises(BadRecord) as caught:
            verifier().verify(PEER, ROUND, of_part, part=part)
        assert caught.value.reason == "index"


def test_one_bad_group_does_not_spoil_the_others() -> None:
    bad = replace(GOOD, task=replace(GOOD.task, seed=5))
    other = replace(GOOD, task=replace(GOOD.task, index=2))
    scored, errors = verifier().verify_all(PEER, ROUND, [GOOD, bad, GOOD, other])
    assert [s.task.index for s in scored] == [1, 2]
    assert [e.reason for e in errors] == ["seed", "duplicate"]


def test_verification_ends_when_its_time_is_up() -> None:
    """A hostile group may take seconds to score: verification ends after the current one."""
    groups = [replace(GOOD, task=replace(GOOD.task, index=index)) for index in range(3)]
    until = time.monotonic() + 0.2

    class Slow(Sums):
        num_scored = 0

        def score(self, task: Task, completions: Sequence[str]) -> list[float]:
            self.num_scored += 1
            time.sleep(0.3)
            return super().score(task, completions)

    slow = Slow()
    with pytest.raises(BadRecord, match="take too long to score") as caught:
        verifier(slow).verify_all(PEER, ROUND, groups, until)
    assert caught.value.reason == "slow-to-score"
    assert slow.num_scored == 1
