"""Scored groups for tests, built from one list per field instead of rollout by rollout."""

from collections.abc import Sequence
from typing import Any

from worker.records import Completion, Rollout, ScoredGroup, Task


def scored_group(
    task: Task,
    question: str,
    texts: Sequence[str],
    rewards: Sequence[float],
    token_ids: Sequence[Sequence[int]] | None = None,
    logprobs: Sequence[Sequence[float]] | None = None,
    truncated: Sequence[bool] | None = None,
    peer_id: str | None = None,
    credits: Sequence[float] | None = None,
) -> ScoredGroup:
    """Make a group. `token_ids` and `truncated`: of our own answers; both None for a peer's."""
    size = len(texts)
    ids: Sequence[Sequence[int]] = token_ids or ((),) * size
    told: Sequence[Sequence[float]] = logprobs or ((),) * size
    cut: Sequence[bool] = truncated or (False,) * size
    is_own = token_ids is not None or truncated is not None
    sampled = [
        Completion(text, tuple(i), tuple(p), t) if is_own else None
        for text, i, p, t in zip(texts, ids, told, cut, strict=True)
    ]
    rollouts = map(Rollout, texts, rewards, sampled, credits or (0.0,) * size)
    return ScoredGroup(task, question, tuple(rollouts), peer_id)


def token_ids(group: ScoredGroup) -> tuple[tuple[int, ...], ...]:
    return tuple(completion.token_ids for completion in group.sampled)


def logprobs(group: ScoredGroup) -> tuple[tuple[float, ...], ...]:
    return tuple(completion.logprobs for completion in group.sampled)


def truncated(group: ScoredGroup) -> tuple[bool, ...]:
    return tuple(completion.truncated for completion in group.sampled)


def change(group: ScoredGroup, **changes: Any) -> ScoredGroup:
    """Make a group like `group` but for arguments of `scored_group`."""
    own = group.sampled
    arguments: dict[str, Any] = {
        "texts": group.completions,
        "rewards": group.rewards,
        "credits": group.credits,
        "peer_id": group.peer_id,
        "token_ids": token_ids(group) if own else None,
        "logprobs": logprobs(group) if any(logprobs(group)) else None,
        "truncated": truncated(group) if own else None,
    }
    return scored_group(group.task, group.question, **{**arguments, **changes})
