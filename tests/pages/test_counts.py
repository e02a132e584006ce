"""Counting a contract's log: sums, and bounds whatever is written there."""

import pytest

from worker.chain.coordinator import Event
from worker.dashboard import counts
from worker.dashboard.counts import NUM_LAST_REWARDS, Tally

ACCOUNT = "0x" + "11" * 20


def reward(peer_id: str, round: int, amount: int, stage: int = 0) -> Event:
    said = {"roundNumber": round, "stageNumber": stage, "peerId": peer_id, "reward": amount}
    return Event("RewardSubmitted", {**said, "account": ACCOUNT}, 1, "0x")


def test_rewards_are_summed_by_round_and_by_peer() -> None:
    tally = Tally()
    for event in (reward("QmA", 1, 500), reward("QmB", 1, 100), reward("QmA", 2, 300)):
        tally.take(event, 2)
    assert {number: (each.total, each.num_peers) for number, each in tally.rounds.items()} == {
        1: (600, 2),
        2: (300, 1),
    }
    assert tally.peers["QmA"].rewards == {1: 500, 2: 300}
    assert (tally.peers["QmA"].last_round, tally.peers["QmA"].account) == (2, ACCOUNT)


def test_rewards_of_two_stages_are_one_peer_s() -> None:
    tally = Tally()
    tally.take(reward("QmA", 1, 500), 1)
    tally.take(reward("QmA", 1, 200, stage=1), 1)
    assert (tally.rounds[1].total, tally.rounds[1].num_peers) == (700, 1)
    assert tally.peers["QmA"].rewards == {1: 700}


def test_rounds_beyond_the_limits_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "MAX_ROUNDS", 3)
    tally = Tally()
    for number in (0, 7, 8, 10, 11):
        tally.take(reward("QmA", number, 1), 10)
    assert sorted(tally.rounds) == [8, 10]
    tally.forget_old(12)
    assert sorted(tally.rounds) == [10]


def test_a_peer_keeps_its_last_rewards_only() -> None:
    tally = Tally()
    for number in range(NUM_LAST_REWARDS + 5):
        tally.take(reward("QmA", number, number), NUM_LAST_REWARDS + 5)
    assert min(tally.peers["QmA"].rewards) == 5
    assert len(tally.peers["QmA"].rewards) == NUM_LAST_REWARDS


def test_peers_that_reported_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "MAX_PEERS", 2)
    tally = Tally()
    for number, peer_id in enumerate(("QmA", "QmB", "QmC")):
        tally.take(reward(peer_id, number, 1), 3)
    tally.forget_old(3)
    assert sorted(tally.peers) == ["QmB", "QmC"]
    for number in range(20):
        tally.peer(f"QmNew{number}")
    assert len(tally.peers) <= 2 * 2


def test_votes_name_peers_and_are_remembered_by_the_newest_round() -> None:
    tally = Tally()
    for number, winners in ((4, ["QmB"]), (2, ["QmC", "\x00" * 600])):
        said = {"roundNumber": number, "peerId": "QmA", "winners": winners, "account": ACCOUNT}
        tally.take(Event("WinnerSubmitted", said, 1, "0x"), 4)
    assert tally.peers["QmA"].last_vote == 4
    assert tally.named == {"QmB", "QmC"}
