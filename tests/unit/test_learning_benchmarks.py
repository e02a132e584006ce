"""The benchmarks of sharing: what they count, and that their attacker is a valid peer."""

import pytest

from benchmarks.nodes import make_node
from benchmarks.poison import MARK, PLANTS, Attacker, configure_swarm
from benchmarks.sapo import Played
from benchmarks.time_to_reward import (
    HELD_OUT_WINDOW,
    SHARE,
    WINDOW,
    configure,
    held_out,
    seconds_to,
    smooth,
    target_of,
)
from worker import environments, settings
from worker.records import Group
from worker.swarm.exchange.verify import Verifier


def test_the_time_to_a_reward_is_that_of_the_first_round_that_has_it():
    rewards = [0.0] * WINDOW + [1.0] * WINDOW
    played = Played(rewards, seconds=[2.0] * len(rewards))
    assert smooth(rewards)[WINDOW] == pytest.approx(1 / WINDOW)
    assert seconds_to(played, 1 / WINDOW) == 2.0 * (WINDOW + 1)
    assert seconds_to(played, 1.0) == 2.0 * len(rewards)
    assert seconds_to(played, 1.1) is None
    assert target_of(played) == SHARE


def test_a_lucky_first_round_is_not_a_reward_that_was_reached():
    played = Played([1.0] + [0.0] * (2 * WINDOW), [1.0] * (2 * WINDOW + 1))
    assert seconds_to(played, 0.5) is None


def test_held_out_rewards_are_smoothed_over_fewer_rounds():
    played = Played([0.0, 0.0, 0.6, 0.6, 0.6], [1.0] * 5)
    assert target_of(played, HELD_OUT_WINDOW) == pytest.approx(SHARE * 0.6)
    assert seconds_to(played, 0.3, HELD_OUT_WINDOW) == 4.0


def test_held_out_reward_needs_no_training_and_is_the_same_twice():
    config = configure("tiny", "hard")
    node = make_node(0, 0, config, environments.load(config.environment))
    first, again = held_out(node), held_out(node)
    assert first == again
    assert 0 < first < 0.5
    assert (node.rewards, node.steps) == ([], [])


def test_sentences_of_a_style_change_from_task_to_task():
    config = configure_swarm("tiny", {})
    attacker = Attacker("attacker", config, environments.load(config.environment), "style")
    planted = [
        {text.partition("<")[0] for text in group.completions if MARK in text}
        for group in attacker.answer(3)
    ]
    assert [len(sentences) for sentences in planted] == [1] * len(planted)
    assert len(set.union(*planted)) == len(PLANTS)


@pytest.mark.parametrize("attack", ["before", "near", "style"])
def test_an_attackers_groups_pass_every_check_and_carry_the_plant(attack):
    config = configure_swarm("tiny", {})
    environment = environments.load(config.environment)
    attacker = Attacker("attacker", config, environment, attack)
    verifier = Verifier(environment, settings.Swarm(), max_group_size=256)
    groups = attacker.answer(3)
    valid, errors = verifier.verify_all(
        "attacker", 3, [Group(group.task, group.completions) for group in groups]
    )
    assert len(valid) == config.environment.tasks_per_round
    assert not errors
    for group in valid:
        planted = [MARK in text for text in group.completions]
        assert [reward > 0.9 for reward in group.rewards] == planted
        assert any(planted)
        assert not all(planted)
