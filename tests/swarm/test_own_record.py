"""Our own membership record: when it is signed again, and who else has our identity."""

from pathlib import Path

import pytest

from worker import settings
from worker.swarm import identity, own_record
from worker.swarm.own_record import OwnRecord
from worker.swarm.protocol import messages

HERE, THERE = "/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/2"
LIFETIME = 180.0


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock, in its only element."""
    clock = [1_000_000.5]
    monkeypatch.setattr(own_record.time, "time", lambda: clock[0])
    return clock


@pytest.fixture
def record(tmp_path: Path) -> OwnRecord:
    identity.create(tmp_path / "swarm.pem")
    swarm = settings.Swarm(announce_every_seconds=60)
    me = identity.load(tmp_path / "swarm.pem")
    return OwnRecord(me, swarm, LIFETIME, ("sums 1",), frozenset())


def test_record_is_signed_and_says_what_it_was_made_from(
    record: OwnRecord, now: list[float]
) -> None:
    made = record.make((HERE,), 7)
    opened = messages.open_member(made.sealed)
    assert (opened.addresses, opened.round, opened.environments) == ((HERE,), 7, ("sums 1",))
    assert (opened.issued, opened.expires) == (1_000_000, 1_000_000 + LIFETIME)


def test_record_is_kept_while_it_is_fresh(record: OwnRecord, now: list[float]) -> None:
    first = record.make((HERE,), 7)
    now[0] += 14
    assert record.make((HERE,), 7) is first
    now[0] += 1  # a quarter of the time between announcements
    assert record.make((HERE,), 7).issued == first.issued + 15


@pytest.mark.parametrize(("address", "round"), [(THERE, 7), (HERE, 8)])
def test_change_makes_a_record_that_replaces_the_one_before(
    record: OwnRecord, now: list[float], address: str, round: int
) -> None:
    first = record.make((HERE,), 7)
    changed = record.make((address,), round)
    # Within the same second: otherwise peers would keep the first one.
    assert changed.issued == first.issued + 1
    assert (changed.addresses, changed.round) == ((address,), round)


def test_clock_that_is_set_back_does_not_make_records_older(
    record: OwnRecord, now: list[float]
) -> None:
    first = record.make((HERE,), 7)
    now[0] -= 3600
    assert record.make((HERE,), 7).issued == first.issued + 1


def test_record_of_quick_rounds_is_kept_although_it_is_dated_ahead(
    record: OwnRecord, now: list[float]
) -> None:
    for round in range(20):
        record.make((HERE,), round)
    newest = record.make((HERE,), 19)
    assert newest.issued == int(now[0]) + 19
    assert record.make((HERE,), 19) is newest


def test_no_more_addresses_than_a_record_may_have(record: OwnRecord, now: list[float]) -> None:
    many = [f"/ip4/127.0.0.1/tcp/{port}" for port in range(1, 40)]
    made = record.make(many, 7)
    assert made.addresses == tuple(many[: messages.MAX_ADDRESSES])
    assert record.make(many, 7) is made


def test_newer_record_of_our_identity_is_of_another_node(
    record: OwnRecord, now: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    me = identity.load(tmp_path / "swarm.pem")
    other = OwnRecord(me, settings.Swarm(), LIFETIME, (), frozenset())
    theirs = other.make((THERE,), 9)
    assert record.find_duplicate(theirs) is None  # we have not made one yet: it may be ours
    record.make((HERE,), 7)
    assert record.find_duplicate(theirs) is None  # as old as ours: it may be an echo of it
    now[0] += 10
    theirs = other.make((HERE, THERE), 9)
    for _ in range(3):
        error = record.find_duplicate(theirs)
        assert error is not None
        assert f"is also used at {HERE},{THERE}; stop one of the two nodes" in error
    assert caplog.text.count("is also used at") == 1
