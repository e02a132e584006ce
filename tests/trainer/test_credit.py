import pytest

from tests.groups import scored_group
from worker.environments.answers import is_closed
from worker.records import Task
from worker.trainer.credit import give_credit
from worker.trainer.grpo import group_advantages
from worker.trainer.trainer import _advantages

TASK = Task("gcd", "0" * 12, 1, 0)


def group(texts, rewards):
    return scored_group(TASK, "?", tuple(texts), tuple(rewards))


def test_where_all_earn_nothing_closed_answers_are_better_by_what_the_credit_weighs():
    hopeless = group(["<answer>1</answer>", "no", "no", "no"], [0.0] * 4)
    earning = group(["<answer>1</answer>", "no", "no", "no"], [1.0, 0.0, 0.0, 0.0])
    given, same = give_credit([hopeless, earning], is_closed)
    weight = 1 - 0.25 / 0.3
    assert given.credits == pytest.approx((weight, 0, 0, 0))
    assert given.teaches
    assert not given.has_signal
    assert given.rewards == hopeless.rewards
    assert given.mean_reward == 0
    assert same is earning
    best = weight * group_advantages([1, 0, 0, 0], "group")[0]
    assert _advantages(given, "group") == pytest.approx([best, 0, 0, 0])  # the others are left out
    assert _advantages(earning, "group") == group_advantages(earning.rewards, "group")


def test_the_credit_is_gone_when_most_answers_close_by_themselves():
    groups = [group(["<answer>1</answer>"] * 4 + ["no"], [0.0] * 5)]
    assert give_credit(groups, is_closed) == groups


def test_neither_the_instruction_s_own_example_nor_rewards_that_are_equal_get_credit():
    quoted = group(["<answer>your answer</answer>", "no"], [0.0, 0.0])
    assert not give_credit([quoted], is_closed)[0].teaches
    equal = group(["<answer>1</answer>", "no"], [0.5, 0.5])
    assert not give_credit([equal], is_closed)[0].teaches
