"""The vote of a node for the best peer of a round."""

from collections.abc import Sequence
from statistics import fmean

from worker.records import ScoredGroup


def winners(
    me: str,
    local: Sequence[ScoredGroup],
    external: Sequence[ScoredGroup],
) -> list[str]:
    """Return our vote: the peer with the highest mean reward that we verified in this round.

    We vote for ourselves only if our mean reward is higher than that of every peer that we heard.
    Without any such peer the result is empty.
    """
    rewards: dict[str, list[float]] = {}
    for group in external:
        if group.peer_id is not None:
            rewards.setdefault(group.peer_id, []).append(group.mean_reward)
    if not rewards:
        return []
    best = max(rewards, key=lambda peer: (fmean(rewards[peer]), peer))
    own = [group.mean_reward for group in local]
    return [me if own and fmean(own) > fmean(rewards[best]) else best]
