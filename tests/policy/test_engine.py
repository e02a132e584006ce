"""The end of an answer, and rows of `model.generate` cut there."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from worker.policy.engines.engine import Ending, Sampled
from worker.policy.engines.transformers_engine import cut

END = 1
ALWAYS = [True] * 10


def ending(
    is_done: Callable[[list[int]], bool] = lambda tokens: False, may_be_done: list[bool] = ALWAYS
) -> Ending:
    return Ending(frozenset({END}), is_done, may_be_done)


def test_answer_ends_after_an_end_token_or_when_it_is_done() -> None:
    rule = ending(lambda tokens: tokens[-2:] == [3, 4])
    assert rule.reached([5, END])
    assert not rule.reached([END, 5])
    assert rule.reached([3, 4])
    assert not rule.reached([4])


def test_text_is_looked_at_only_after_tokens_that_may_end_it() -> None:
    asked: list[list[int]] = []

    def is_done(tokens: list[int]) -> bool:
        asked.append(list(tokens))
        return True

    rule = ending(is_done, [False] * 4 + [True] + [False] * 5)
    assert not rule.reached([2, 3])
    assert rule.reached([2, 4])
    assert rule.reached([END])
    assert asked == [[2, 4]]


@pytest.mark.parametrize(
    ("tokens", "expected", "finished"),
    [
        ([5, END, 0, 0], (5, END), True),
        ([END], (END,), True),
        ([5, 6], (5, 6), False),
        ([], (), False),
        ([5, 3, 4, 7], (5, 3, 4), True),
    ],
)
def test_row_is_cut_at_its_end(
    tokens: list[int], expected: tuple[int, ...], finished: bool
) -> None:
    logprobs = [-float(n) for n in range(len(tokens))]
    found = cut(tokens, logprobs, ending(lambda seen: seen[-2:] == [3, 4]))
    assert found == Sampled(expected, tuple(logprobs[: len(expected)]), finished)


@hypothesis_settings(max_examples=50, deadline=None, database=None)
@given(tokens=st.lists(st.integers(0, 5), max_size=8))
def test_cut_row_has_at_most_one_end_and_only_at_its_end(tokens: list[int]) -> None:
    found = cut(tokens, [0.0] * len(tokens), ending())
    assert list(found.token_ids) == tokens[: len(found.token_ids)]
    assert END not in found.token_ids[:-1]
    assert found.finished is (END in tokens)
    assert len(found.logprobs) == len(found.token_ids)
    if not found.finished:
        assert list(found.token_ids) == tokens
