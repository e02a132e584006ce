"""A node whose answers teach nothing warns now and then, with what to do about it."""

import math
from types import SimpleNamespace

import pytest

from tests.groups import scored_group
from worker.records import StepMetrics, Task
from worker.settings import Generation
from worker.signal_watch import WARN_AFTER_ROUNDS, SignalWatch, truncated_share

TASK = Task("gcd", "0" * 16, 1, 0)
LIMIT = 8


def groups_of(text="<answer>1</answer>", length=4, truncated=False, count=4):
    """Return a group of our own with equal answers."""
    size = [list(range(length))] * count
    return [
        scored_group(TASK, "?", (text,) * count, (0.25,) * count, size, None, (truncated,) * count)
    ]


@pytest.fixture
def watch() -> SignalWatch:
    policy = SimpleNamespace(
        template=SimpleNamespace(thinks=False), form=SimpleNamespace(name="system")
    )
    return SignalWatch(policy, Generation(max_completion_length=LIMIT))


def see(watch: SignalWatch, skipped: str | None, groups) -> None:
    watch.see(StepMetrics(math.nan, math.nan, 0.0, 0, 0, 0, skipped), groups)


def test_warning_comes_at_powers_of_two_alone(watch, caplog):
    warned = []
    for number in range(1, 8 * WARN_AFTER_ROUNDS + 1):
        caplog.clear()
        see(watch, "no-signal", groups_of())
        if caplog.records:
            warned.append(number)
            assert f"rounds_in_a_row={number} reward_mean=0.250" in caplog.text
    assert warned == [WARN_AFTER_ROUNDS * factor for factor in (1, 2, 4, 8)]


@pytest.mark.parametrize("skipped", [None, "non-finite"])
def test_any_other_step_begins_the_count_again(watch, caplog, skipped):
    for _ in range(3):
        for _ in range(WARN_AFTER_ROUNDS - 1):
            see(watch, "no-signal", groups_of())
        see(watch, skipped, groups_of())
    assert watch.rounds_without == 0
    assert caplog.records == []


@pytest.mark.parametrize(
    ("groups", "thinks", "advice"),
    [
        (groups_of(length=LIMIT, truncated=True), False, "100% of the answers were cut off at 8"),
        (groups_of(length=LIMIT, truncated=True), True, "or set generation.thinking to off"),
        (
            groups_of("no tag"),
            False,
            "0% of the answers closed their <answer> tag, asked in the form system",
        ),
        (groups_of(), False, "name easier tasks in environment.families (level: auto)"),
        (groups_of(length=LIMIT - 1, truncated=True), False, "name easier tasks"),
        (groups_of() + groups_of(length=LIMIT, truncated=True), False, "name easier tasks"),
        (groups_of() + groups_of("no tag"), False, "name easier tasks"),
    ],
)
def test_advice_is_on_what_is_wrong_with_most_answers(watch, caplog, groups, thinks, advice):
    watch._policy.template.thinks = thinks
    watch.rounds_without = WARN_AFTER_ROUNDS - 1
    see(watch, "no-signal", groups)
    assert advice in caplog.text
    assert ("thinking" in caplog.text) == thinks


def test_only_answers_cut_off_at_the_limit_of_the_settings_count():
    at_limit = groups_of(length=LIMIT, truncated=True, count=1)
    shorter = groups_of(length=LIMIT - 1, truncated=True, count=2)
    whole = groups_of(length=LIMIT, truncated=False, count=1)
    assert truncated_share([*at_limit, *shorter, *whole], LIMIT) == 0.25
    assert truncated_share(at_limit, LIMIT) == 1.0
    assert truncated_share(shorter, LIMIT) == 0.0
