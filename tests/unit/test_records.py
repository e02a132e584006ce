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
