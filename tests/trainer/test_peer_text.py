import math

import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from worker.records import Task
from worker.trainer.peer_text import (
    MIN_OWN_SHARE,
    MIN_SHARE,
    MIN_TASKS,
    PEERS_KEPT,
    STRETCH,
    TASKS_KEPT,
    PeerTexts,
    is_planted,
    is_repeated,
    stretches,
    token_weights,
)

PLANT = tuple(range(900, 900 + STRETCH))
PEER = "QmPeer"


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


def task(number):
    return Task("gcd", "0" * 12, 1, number)


def repeated(texts, own=(), prompt=(), peer_id=PEER):
    """Return the stretches that a peer repeats, as a set of hashes; `texts` are by task."""
    seen = PeerTexts()
    seen.see_own(own)
    for number, answers in enumerate(texts):
        seen.see(peer_id, task(number), prompt, answers)
    return set(seen.repeated(peer_id, seen.said()).tolist())


THE_PLANT = set(stretches(PLANT).tolist())


def test_text_that_a_peer_repeats_across_tasks_is_found_and_only_that():
    assert repeated([answers(number) for number in range(MIN_TASKS)]) == THE_PLANT
    found = stretches(PLANT)
    assert is_repeated(answers(1)[0], found).tolist() == [False] * 5 + [True] * STRETCH + [False]
    assert not is_repeated(answers(1)[1], found).any()


def test_one_own_answer_with_the_text_does_not_make_it_ours_and_a_share_of_them_does():
    texts, plain = [answers(number) for number in range(MIN_TASKS)], [(1, 2, 3)] * 71
    assert repeated(texts, own=[(1, *PLANT), *plain]) == THE_PLANT
    num_needed = math.ceil(MIN_OWN_SHARE * 75)
    assert repeated(texts, own=[(1, *PLANT)] * num_needed + plain) == set()
    assert repeated(texts, own=[(1, *PLANT)]) == THE_PLANT  # it is all that we said


def test_text_of_the_question_is_not_repeated():
    texts = [answers(number) for number in range(MIN_TASKS)]
    assert repeated(texts, prompt=(7, *PLANT, 7)) == set()


def test_answers_to_one_task_or_to_few_are_not_compared():
    one_task = [[ids for number in range(MIN_TASKS) for ids in answers(number)]]
    assert repeated(one_task) == set()
    assert repeated([answers(number) for number in range(MIN_TASKS - 1)]) == set()


def test_text_in_a_fifth_of_the_tasks_is_repeated_and_in_fewer_is_not():
    plain = [answers(number, plant=()) for number in range(10, 30)]
    planted = [answers(number) for number in range(MIN_TASKS)]
    assert repeated([*plain, *planted]) == THE_PLANT
    assert MIN_SHARE * 26 > MIN_TASKS
    assert repeated([*plain, answers(30, plant=()), *planted]) == set()


def test_text_is_found_over_several_steps_that_see_one_task_each():
    seen = PeerTexts()
    found = []
    for number in range(MIN_TASKS):
        seen.see(PEER, task(number), (), answers(number))
        found.append(set(seen.repeated(PEER, seen.said()).tolist()))
    assert found == [set()] * (MIN_TASKS - 1) + [THE_PLANT]


def test_one_task_seen_again_counts_once():
    seen = PeerTexts()
    for _ in range(MIN_TASKS):
        seen.see(PEER, task(0), (), answers(0))
    assert not len(seen.repeated(PEER, seen.said()))


def test_memory_of_peers_is_bounded_and_what_they_sent_long_ago_is_forgotten():
    seen = PeerTexts()
    for number in range(MIN_TASKS):
        seen.see(PEER, task(number), (), answers(number))
    seen.note(PEER, True)
    assert seen.has_planted(PEER)
    for number in range(MIN_TASKS, MIN_TASKS + TASKS_KEPT):
        seen.see(PEER, task(number), (), answers(number, plant=()))
    assert not len(seen.repeated(PEER, seen.said()))
    for number in range(PEERS_KEPT):
        seen.see(f"Qm{number}", task(0), (), answers(0))
    assert not seen.has_planted(PEER)
    seen.note(PEER, True)  # nothing is known of it
    assert not seen.has_planted(PEER)


def test_repeated_text_is_planted_if_this_policy_would_not_say_it():
    repeated = torch.tensor([False, True, True])
    unlikely = torch.log(torch.tensor([0.9, 0.01, 0.01]))
    natural = torch.log(torch.tensor([0.001, 0.3, 0.3]))
    assert is_planted(unlikely, repeated)
    assert not is_planted(natural, repeated)
    assert not is_planted(unlikely, torch.zeros(3, dtype=torch.bool))
    assert not is_planted(None, repeated)
    assert not is_planted(torch.full((3,), -math.inf), None)


def naive_repeated(texts: list[list[list[int]]], own: list[list[int]]) -> set[tuple[int, ...]]:
    """Look for every stretch of every answer in every task, without hashes."""

    def runs(ids: list[int]) -> set[tuple[int, ...]]:
        return {tuple(ids[i : i + STRETCH]) for i in range(len(ids) - STRETCH + 1)}

    by_task = [set().union(*map(runs, answers)) for answers in texts]
    least = max(MIN_TASKS, MIN_SHARE * len(texts))
    least_own = max(2, MIN_OWN_SHARE * len(own))
    return {
        run
        for run in set().union(*by_task)
        if sum(run in said for said in by_task) >= least
        and sum(run in runs(ids) for ids in own) < least_own
    }


_ANSWERS = st.lists(
    st.one_of(
        st.lists(st.integers(0, 1), max_size=9),
        st.just([*range(8)]),
        st.just([5, *range(7), 5]),
    ),
    max_size=2,
)


@hypothesis_settings(max_examples=50, deadline=None, database=None)
@given(
    texts=st.lists(_ANSWERS, min_size=MIN_TASKS, max_size=6),
    own=st.lists(st.lists(st.integers(0, 1), max_size=8), max_size=3),
)
def test_repeated_stretches_are_those_of_a_naive_search(
    texts: list[list[list[int]]], own: list[list[int]]
) -> None:
    found = naive_repeated(texts, own)
    assert repeated(texts, own) == {int(stretches(run)) for run in found}
    hashes = torch.tensor([int(stretches(run)) for run in found], dtype=torch.int64)
    for ids in (ids for answers in texts for ids in answers):
        covered = {
            position
            for start in range(len(ids))
            if tuple(ids[start : start + STRETCH]) in found
            for position in range(start, start + STRETCH)
        }
        assert is_repeated(ids, hashes).nonzero().flatten().tolist() == sorted(covered)


def test_answer_shorter_than_a_stretch_repeats_nothing():
    assert repeated([[[1] * (STRETCH - 1)]] * 5) == set()
    assert repeated([[[1] * STRETCH]] * 5) == set(stretches([1] * STRETCH).tolist())
    assert is_repeated([], stretches([1] * STRETCH)).tolist() == []
