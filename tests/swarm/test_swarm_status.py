"""Counters of the exchange: bounded, whatever peers send."""

import pytest

from worker.swarm import status
from worker.swarm.status import MAX_QUARANTINED, MAX_SENDERS_COUNTED, REFUSALS, Tally


def test_rejections_are_counted_by_reason_and_by_sender() -> None:
    tally = Tally()
    for peer, reason in (("a", "seed"), ("a", "seed"), ("b", "duplicate")):
        tally.reject(peer, reason)
    assert tally.rejected == {"seed": 2, "duplicate": 1}
    assert tally.rejected_by_peer == {"a": 2, "b": 1}


def test_senders_that_are_counted_are_limited_and_known_ones_go_on() -> None:
    tally = Tally()
    for number in range(MAX_SENDERS_COUNTED + 10):
        tally.reject(f"peer-{number}", "seed")
    tally.reject("peer-0", "seed")
    assert len(tally.rejected_by_peer) == MAX_SENDERS_COUNTED
    assert tally.rejected_by_peer["peer-0"] == 2
    assert tally.rejected["seed"] == MAX_SENDERS_COUNTED + 11


def test_reasons_of_peers_are_untrusted_text() -> None:
    tally = Tally()
    for reason in sorted(REFUSALS):
        tally.note_refusal(reason)
    for number in range(100):
        tally.note_refusal(f"reason {number}")
    assert tally.refused.pop("other") == 100
    assert set(tally.refused) == REFUSALS


def test_newest_group_is_that_of_a_peer_that_was_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(status.time, "time", lambda: now[0])
    tally = Tally()
    tally.take_in(num_fetched=9, num_verified=0)
    assert (tally.newest_group_seconds, tally.groups_a_peer) == (None, 0)
    tally.take_in(num_fetched=9, num_verified=4)
    now[0] += 61.4
    tally.take_in(num_fetched=5, num_verified=0)
    assert (tally.newest_group_seconds, tally.groups_a_peer) == (61, 9)
    assert tally.groups == {"fetched": 23, "verified": 4}
    now[0] -= 500  # the clock was set back
    assert tally.newest_group_seconds == 0


def test_newest_quarantines_are_kept_with_their_reason() -> None:
    tally = Tally()
    for number in range(MAX_QUARANTINED + 1):
        tally.quarantine(f"peer-{number}", "seed:1, for 60 s")
    tally.quarantine("peer-1", "seed:2, for 120 s")
    assert list(tally.quarantines) == [f"peer-{n}" for n in range(2, MAX_QUARANTINED + 1)] + [
        "peer-1"
    ]
    assert tally.quarantines["peer-1"][1] == "seed:2, for 120 s"
