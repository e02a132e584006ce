"""The benchmarks of sharing: what they count, and that their attacker is a valid peer."""

import pytest

from benchmarks.poison import MARK, Attacker, configure_swarm
from benchmarks.sapo import Played
from benchmarks.time_to_reward import WINDOW, best_of, seconds_to, smooth
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
    assert best_of(played) == (1.0, 2.0 * len(rewards))


def test_a_lucky_first_round_is_not_a_reward_that_was_reached():
    played = Played([1.0] + [0.0] * (2 * WINDOW), [1.0] * (2 * WINDOW + 1))
    assert seconds_to(played, 0.5) is None


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
