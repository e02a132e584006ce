"""The order of a rollout: a canary, the coordinator, then batches of the chosen size."""

from collections.abc import Collection

import pytest

from deploys.fleet.batches import Batch, Size, next_batch
from worker.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "num_hosts", "size"),
    [
        ("1", 20, 1),
        ("4", 20, 4),
        ("99999", 20, 99999),
        ("25%", 20, 5),
        ("25%", 21, 6),  # rounded up
        ("1%", 20, 1),
        ("100%", 3, 3),
    ],
)
def test_size_is_a_number_or_a_percentage(text: str, num_hosts: int, size: int) -> None:
    assert Size.parse(text).of(num_hosts) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "0%", "101%", "1.5", "4 ", "04", "100000", "a"])
def test_other_sizes_are_refused_with_the_value(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--batch: got .*; expected a number of hosts, or 1%"):
        Size.parse(text)


def order(
    hosts: str, coordinators: Collection[str], bare: Collection[str] = (), size: str = "2"
) -> list[tuple[str, str]]:
    """Return kind and hosts of each batch, if all of them pass; hosts are letters."""
    pending, done, batches = list(hosts), list[str](), list[tuple[str, str]]()
    while batch := next_batch(pending, done, coordinators, bare, Size.parse(size)):
        batches.append((batch.kind, "".join(batch.hosts)))
        pending = [host for host in pending if host not in batch.hosts]
        done += batch.hosts
    assert not pending
    return batches


def test_one_worker_goes_first_then_the_coordinator_then_batches() -> None:
    assert order("Cabcde", coordinators="C") == [
        ("canary", "a"),
        ("coordinator", "C"),
        ("batch", "bc"),
        ("batch", "de"),
    ]


def test_coordinator_with_nothing_on_it_goes_before_the_canary() -> None:
    assert order("abC", coordinators="C", bare="C") == [
        ("coordinator", "C"),
        ("canary", "a"),
        ("batch", "b"),
    ]


def test_several_coordinators_go_one_by_one() -> None:
    kinds = order("CDab", coordinators="CD")
    assert kinds == [("canary", "a"), ("coordinator", "C"), ("coordinator", "D"), ("batch", "b")]


def test_fleet_without_workers_or_without_coordinators() -> None:
    assert order("C", coordinators="C") == [("coordinator", "C")]
    assert order("abc", coordinators="") == [("canary", "a"), ("batch", "bc")]


def test_percentage_is_of_the_whole_fleet() -> None:
    # Of the hosts that are left, it would be fewer in each batch.
    assert order("abcdefghi", coordinators="", size="40%") == [
        ("canary", "a"),
        ("batch", "bcde"),
        ("batch", "fghi"),
    ]


def test_failed_canary_is_followed_by_another_one() -> None:
    # It is neither pending nor done: what it was to show is still unknown.
    assert next_batch(["b", "c"], [], "", "", Size(2)) == Batch("canary", ("b",))


def test_done_coordinator_is_no_canary() -> None:
    assert next_batch(["a", "b"], ["C"], "C", "", Size(2)) == Batch("canary", ("a",))


def test_nothing_is_left_at_the_end() -> None:
    assert next_batch([], ["a", "C"], "C", "", Size(2)) is None
