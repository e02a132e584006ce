import math

import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from worker.trainer.peer_text import (
    MIN_TASKS,
    STRETCH,
    is_planted,
    is_repeated,
    repeated_stretches,
    stretches_of,
    token_weights,
)

PLANT = tuple(range(900, 900 + STRETCH))


def answers(task, plant=PLANT):
    """Two answers to a task, one with the planted text between its own tokens."""
    own = tuple(range(10 * task, 10 * task + 5))
    return [(*own, *plant, 10 * task), (*own, 8)]


def test_a_token_counts_as_much_as_it_is_likely_up_to_the_bound():
    logprobs = torch.log(torch.tensor([0.5, 0.1, 0.05, 0.001]))
    assert torch.allclose(token_weights(logprobs, 0.1), torch.tensor([1.0, 1.0, 0.5, 0.01]))
    assert token_weights(logprobs, 0.0).tolist() == [1.0] * 4


def test_repeated_tokens_count_nothing():
    logprobs = torch.zeros(3)
    weights = token_weights(logprobs, 0.1, torch.tensor([True, False, True]))
    assert weights.tolist() == [0.0, 1.0, 0.0]


def test_text_that_a_peer_repeats_across_tasks_is_found_and_only_that():
    repeated = repeated_stretches([answers(task) for task in range(4)], said=set())
    assert repeated == {PLANT}
    assert is_repeated(answers(1)[0], repeated).tolist() == [False] * 5 + [True] * STRETCH + [False]
    assert not is_repeated(answers(1)[1], repeated).any()


def test_text_that_this_node_says_is_not_repeated():
    said = stretches_of([(1, *PLANT)])
    assert repeated_stretches([answers(task) for task in range(4)], said) == set()


def test_answers_to_one_task_or_to_few_are_not_compared():
    one_task = [[ids for task in range(4) for ids in answers(task)]]
    assert repeated_stretches(one_task, said=set()) == set()
    few = [answers(task) for task in range(MIN_TASKS - 1)]
    assert repeated_stretches(few, said=set()) == set()


def test_text_in_less_than_half_of_the_tasks_is_not_repeated():
    plain = [answers(task, plant=()) for task in range(10, 15)]
    planted = [answers(task) for task in range(4)]
    assert repeated_stretches([*plain, *planted], said=set()) == set()
    assert repeated_stretches([*plain[:4], *planted], said=set()) == {PLANT}


def test_repeated_text_is_planted_if_this_policy_would_not_say_it():
    repeated = torch.tensor([False, True, True])
    unlikely = torch.log(torch.tensor([0.9, 0.01, 0.01]))
    natural = torch.log(torch.tensor([0.001, 0.3, 0.3]))
    assert is_planted(unlikely, repeated)
    assert not is_planted(natural, repeated)
    assert not is_planted(unlikely, torch.zeros(3, dtype=torch.bool))
    assert not is_planted(None, repeated)
    assert not is_planted(torch.full((3,), -math.inf), None)


def naive_repeated(
    tasks: list[list[list[int]]], said: set[tuple[int, ...]]
) -> set[tuple[int, ...]]:
    """Look for every stretch of every answer in every task, without any counting."""
    found = set()
    for answers in tasks:
        for ids in answers:
            for start in range(len(ids)):
                stretch = tuple(ids[start : start + STRETCH])
                holders = [
                    task
                    for task in tasks
                    if any(
                        tuple(other[i : i + STRETCH]) == stretch
                        for other in task
                        for i in range(len(other))
                    )
                ]
                is_whole = len(stretch) == STRETCH
                if is_whole and stretch not in said and len(holders) >= max(3, len(tasks) / 2):
                    found.add(stretch)
    return found


_ANSWERS = st.lists(
    st.one_of(
        st.lists(st.integers(0, 1), max_size=9),
        st.just([*range(8)]),
        st.just([5, *range(7), 5]),
    ),
    max_size=2,
)


@hypothesis_settings(max_examples=50, deadline=None, database=None)
@given(tasks=st.lists(_ANSWERS, max_size=6), own=st.lists(st.integers(0, 1), max_size=8))
def test_repeated_stretches_are_those_of_a_naive_search(
    tasks: list[list[list[int]]], own: list[int]
) -> None:
    said = stretches_of([own])
    repeated = repeated_stretches(tasks, said)
    assert repeated == (naive_repeated(tasks, said) if len(tasks) >= MIN_TASKS else set())
    for ids in (ids for answers in tasks for ids in answers):
        covered = {
            position
            for start in range(len(ids))
            if tuple(ids[start : start + STRETCH]) in repeated
            for position in range(start, start + STRETCH)
        }
        assert is_repeated(ids, repeated).nonzero().flatten().tolist() == sorted(covered)


def test_answer_shorter_than_a_stretch_repeats_nothing():
    short = [[[1] * (STRETCH - 1)]] * 5
    assert repeated_stretches(short, set()) == set()
    exact = [[[1] * STRETCH]] * 5
    assert repeated_stretches(exact, set()) == {(1,) * STRETCH}
    assert is_repeated([], {(1,) * STRETCH}).tolist() == []
