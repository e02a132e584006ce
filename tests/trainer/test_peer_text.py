import math

import torch

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
