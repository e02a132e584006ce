"""The state that a node's parts share: contact, reach, its own record, and the peer cache."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from worker import settings
from worker.swarm import context as context_module
from worker.swarm import identity
from worker.swarm.context import SwarmContext

HERE = "/ip4/127.0.0.1/tcp/1"


class Clock:
    def __init__(self) -> None:
        self.now = 10_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(context_module.time, "monotonic", clock.monotonic)
    return clock


def make(folder: Path, **section: Any) -> SwarmContext:
    if not (folder / "swarm.pem").exists():
        identity.create(folder / "swarm.pem")
    return SwarmContext(settings.Swarm(**section), folder / "swarm.pem", folder)


@pytest.fixture
def own(tmp_path: Path, clock: Clock) -> SwarmContext:
    return make(tmp_path / "own")


@pytest.fixture
def other(tmp_path: Path) -> SwarmContext:
    other = make(tmp_path / "other")
    other.addresses = (HERE,)
    return other


def test_contact_ends_after_a_record_s_lifetime(
    own: SwarmContext, other: SwarmContext, clock: Clock
) -> None:
    assert own.has_contact is None
    own.learn(other.member().sealed, other.identity.peer_id)
    own.hear(other.identity.peer_id)
    assert own.has_contact
    clock.now += own.peers.lifetime_seconds - 1
    assert own.has_contact
    clock.now += 2
    assert own.has_contact is False


def test_round_in_which_nobody_answers_ends_contact_and_wakes_the_search(
    own: SwarmContext, other: SwarmContext, clock: Clock
) -> None:
    own.learn(other.member().sealed, other.identity.peer_id)
    own.hear(other.identity.peer_id)
    clock.now += 1
    own.fall_silent()
    assert (own.has_contact, own.wake.is_set()) == (False, True)
    clock.now += 1
    own.hear(other.identity.peer_id)
    assert own.has_contact


def test_silence_before_any_contact_is_no_contact(own: SwarmContext) -> None:
    own.fall_silent()
    assert own.has_contact is False


@pytest.mark.parametrize(
    ("section", "addresses", "reach"),
    [
        ({}, (HERE,), "unknown"),
        ({"reachability": "public"}, (HERE,), "direct"),
        ({"reachability": "private"}, (HERE,), "none"),
        ({"announce": ("/ip4/203.0.113.1/tcp/1",)}, (HERE,), "direct"),
        ({"reachability": "private"}, (f"{HERE}/p2p/12D3KooWrelay/p2p-circuit",), "relay"),
    ],
)
def test_reach_follows_from_settings_and_addresses(
    tmp_path: Path, section: dict[str, Any], addresses: tuple[str, ...], reach: str
) -> None:
    context = make(tmp_path, **section)
    context.addresses = addresses
    assert context.reach == reach


def test_record_that_another_peer_relays_is_learned_but_is_no_contact(
    own: SwarmContext, other: SwarmContext
) -> None:
    member = own.learn(other.member().sealed, "12D3KooWrelaying")
    assert member.peer_id == other.identity.peer_id
    assert own.peers.addresses(member.peer_id) == (HERE,)
    assert own.has_contact is None


def test_own_record_is_not_a_peer(own: SwarmContext) -> None:
    own.addresses = (HERE,)
    own.learn(own.member().sealed, "12D3KooWrelaying")
    assert len(own.peers) == 0
    assert own.last_error is None


def test_refusals_are_counted_and_logged_once_per_peer_and_reason(
    own: SwarmContext, caplog: pytest.LogCaptureFixture
) -> None:
    class Stream:
        def __init__(self) -> None:
            self.refusals: list[tuple[str, str]] = []

        async def refuse(self, reason: str, explanation: str) -> None:
            self.refusals.append((reason, explanation))

    stream = Stream()
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        asyncio.run(own.refuse("12D3KooWa", stream, "flood", "too many"))  # type: ignore[arg-type]
    asyncio.run(own.refuse("12D3KooWa", stream, "full", "no room"))  # type: ignore[arg-type]
    assert own.refused == {"flood": 3, "full": 1}
    assert stream.refusals == [("flood", "too many")] * 3 + [("full", "no room")]
    assert [r.getMessage() for r in caplog.records] == [
        "request refused peer=12D3KooWa reason=flood: too many",
        "request refused peer=12D3KooWa reason=full: no room",
    ]


def test_peers_survive_a_restart(own: SwarmContext, other: SwarmContext, tmp_path: Path) -> None:
    own.port = 4001
    own.bootnodes = [f"{HERE}/p2p/{other.identity.peer_id}"]
    own.learn(other.member().sealed, other.identity.peer_id)
    own.hear(other.identity.peer_id)
    own.save_cache()
    again = make(tmp_path / "own")
    assert again.port == 4001
    assert again.cache.peers == (f"{HERE}/p2p/{other.identity.peer_id}",)
    # A node that has not heard anybody yet keeps what the last run knew.
    again.save_cache()
    assert json.loads((tmp_path / "own/peers.json").read_text())["peers"] == list(again.cache.peers)


def test_port_of_the_settings_is_not_cached(tmp_path: Path) -> None:
    bootnode = f"{HERE}/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    context = make(tmp_path, port=4002, bootnodes=(bootnode,))
    assert context.port == 4002
    context.save_cache()
    assert json.loads((tmp_path / "peers.json").read_text())["port"] == 0


def test_cache_that_can_t_be_written_is_logged(
    own: SwarmContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, cache: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(context_module.peer_cache, "save", full)
    own.port = 4001
    own.save_cache()
    assert "peer cache not written reason=No space left on device" in caplog.text
