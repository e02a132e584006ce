"""Records that travel between the parts: seeds, signals, and the order of places."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.groups import scored_group
from worker.records import (
    MAX_PARTS,
    Place,
    StepMetrics,
    Task,
    derived_seed,
    milli_reward,
    part_seed,
    round_seed,
)


def test_round_seed_is_bound_to_peer_and_round():
    assert round_seed("QmA", 1) == 1621399902
    assert len({round_seed(peer, round) for peer in ("QmA", "QmB") for round in range(100)}) == 200
    assert 0 <= round_seed("QmA", 1) < 2**31


def test_group_with_equal_rewards_has_no_signal():
    task = Task("bf", "0" * 16, 1, 0)
    assert not scored_group(task, "?", ("a", "b"), (0.5, 0.5)).has_signal
    assert scored_group(task, "?", ("a", "b"), (0.5, 0.0)).has_signal
    assert scored_group(task, "?", ("a", "b"), (0.5, 0.0)).mean_reward == 0.25


@pytest.mark.parametrize(
    ("rewards", "signal"),
    [
        ((0.5,), 0.0),
        ((0.5, math.nan), 0.0),
        ((0.5, math.inf), 0.0),
        ((0.5, 0.5), 0.0),
        ((1.0, *[0.0] * 7), 1.0),
        ((0.01, 0.05), 0.04 / math.sqrt(2) / 0.2),
        ((0.0, 1.0), 1.0),
    ],
)
def test_signal_is_full_where_rewards_differ_as_right_and_wrong_do(rewards, signal):
    answers = tuple(str(i) for i in range(len(rewards)))
    group = scored_group(Task("bf", "0" * 16, 1, 0), "?", answers, rewards)
    assert group.signal == pytest.approx(signal)


def group_of(rewards, credits=None):
    answers = tuple(str(i) for i in range(len(rewards)))
    return scored_group(Task("bf", "0" * 16, 1, 0), "?", answers, rewards, credits=credits)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_signal_is_between_nothing_and_all(rewards):
    group = group_of(rewards)
    assert 0 <= group.signal <= 1
    assert group.mean_reward == pytest.approx(statistics.fmean(rewards))
    assert group.has_signal == (len(set(rewards)) > 1)
    assert group.has_signal or group.signal == pytest.approx(0)


@pytest.mark.parametrize(
    ("rewards", "credits", "teaches"),
    [
        ((0.0, 1.0), None, True),
        ((0.0, 0.0), None, False),
        ((0.0, 0.0), (0.0, 0.1), True),
        ((0.0, 0.0), (0.1, 0.1), False),
        ((1.0,), (0.5,), False),
    ],
)
def test_group_teaches_by_its_rewards_or_its_credits(rewards, credits, teaches):
    assert group_of(rewards, credits).teaches == teaches


def test_group_of_a_peer_has_no_tokens_of_ours():
    task = Task("bf", "0" * 16, 1, 0)
    own = scored_group(task, "?", ("a", "b"), (0.0, 1.0), truncated=(False, True))
    peers = scored_group(task, "?", ("a", "b"), (0.0, 1.0), peer_id="Qm")
    assert [completion.text for completion in own.sampled] == ["a", "b"]
    assert peers.sampled == ()
    assert own.completions == peers.completions == ("a", "b")


PLACES = st.builds(Place, st.integers(-1, 10**9), st.integers(0, MAX_PARTS))


@given(PLACES, PLACES)
def test_places_are_ordered_by_time(one, other):
    assert one < one.after()
    assert one.after() < Place(one.round + 1, 0)
    if one < other:
        assert one.after() <= other
    assert (one < other) == ((one.round, one.part) < (other.round, other.part))


@given(st.text(max_size=50), PLACES)
def test_seeds_have_31_bits_and_each_part_its_own(peer, place):
    first = Place(place.round, 0)
    assert part_seed(peer, first) == round_seed(peer, place.round)
    seeds = {part_seed(peer, Place(place.round, part)) for part in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(("one", "other"), [("1/11", "11/1"), ("Qm1", "Qm1 "), ("", "0")])
def test_seed_depends_on_each_character(one, other):
    assert derived_seed(one) != derived_seed(other)
    assert derived_seed(one) == derived_seed(one)


@given(st.lists(st.floats(0, 1), max_size=20))
def test_reward_on_the_chain_is_in_thousandths(means):
    reward = milli_reward(means)
    assert isinstance(reward, int)
    assert 0 <= reward <= 1000
    assert not means or abs(reward - 1000 * statistics.fmean(means)) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("local", "external", "share"), [(0, 0, 0), (4, 0, 0), (0, 3, 1), (6, 2, 0.25)]
)
def test_share_of_peers_groups(local, external, share):
    assert StepMetrics(0.0, 0.0, 0.0, local, external, 0).external_share == share
