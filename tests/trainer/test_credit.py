import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.groups import scored_group
from worker.environments.answers import is_closed
from worker.records import Task
from worker.trainer.credit import ENOUGH, closed_share, give_credit
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


CLOSED, OPEN = "<answer>1</answer>", "no"


@hypothesis_settings(max_examples=50, deadline=None, database=None)
@given(
    answers=st.lists(
        st.lists(
            st.tuples(st.booleans(), st.sampled_from([0.0, 0.0, 1.0])), min_size=2, max_size=5
        ),
        max_size=4,
    )
)
def test_credit_goes_to_closed_answers_of_groups_that_earn_nothing(
    answers: list[list[tuple[bool, float]]],
) -> None:
    groups = [
        group([CLOSED if closed else OPEN for closed, _ in each], [reward for _, reward in each])
        for each in answers
    ]
    flags = [closed for each in answers for closed, _ in each]
    share = sum(flags) / len(flags) if flags else 0.0
    assert closed_share(groups, is_closed) == pytest.approx(share)
    weight = max(0.0, 1 - share / ENOUGH)
    for before, after in zip(groups, give_credit(groups, is_closed), strict=True):
        assert after.rewards == before.rewards
        earns = any(before.rewards)
        expected = [0.0 if earns else weight * is_closed(text) for text in before.completions]
        assert after.credits == pytest.approx(expected)


@pytest.mark.parametrize(("num_closed", "has_credit"), [(2, True), (3, False), (4, False)])
def test_credit_ends_at_three_answers_in_ten(num_closed: int, has_credit: bool) -> None:
    texts = [CLOSED] * num_closed + [OPEN] * (10 - num_closed)
    (given_to,) = give_credit([group(texts, [0.0] * 10)], is_closed)
    assert any(given_to.credits) is has_credit


def test_round_without_answers_has_no_closed_ones() -> None:
    assert closed_share([], is_closed) == 0
    assert give_credit([], is_closed) == []
