import math

import pytest

from tests.groups import scored_group
from worker.records import Task, round_seed


def test_round_seed_is_bound_to_peer_and_round():
    assert round_seed("QmA", 1) == 1621399902
    assert len({round_seed(peer, round) for peer in ("QmA", "QmB") for round in range(100)}) == 200
    assert 0 <= round_seed("QmA", 1) < 2**31


def test_group_with_equal_rewards_has_no_signal():
    task = Task("bf", "0" * 16, 1, 0)
    assert not scored_group(task, "?", ("a", "b"), (0.5, 0.5)).has_signal
    assert scored_group(task, "?", ("a", "b"), (0.5, 0.0)).has_signal
    assert scored_group(task, "?", ("a", "b"), (0.5, 0.0)).mean_reward == 0.25


@pytest.mark.parametrize(
    ("rewards", "signal"),
    [
        ((0.5,), 0.0),
        ((0.5, math.nan), 0.0),
        ((0.5, math.inf), 0.0),
        ((0.5, 0.5), 0.0),
        ((1.0, *[0.0] * 7), 1.0),
        ((0.01, 0.05), 0.04 / math.sqrt(2) / 0.2),
        ((0.0, 1.0), 1.0),
    ],
)
def test_signal_is_full_where_rewards_differ_as_right_and_wrong_do(rewards, signal):
    answers = tuple(str(i) for i in range(len(rewards)))
    group = scored_group(Task("bf", "0" * 16, 1, 0), "?", answers, rewards)
    assert group.signal == pytest.approx(signal)
