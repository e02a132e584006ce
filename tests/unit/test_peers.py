"""The view of a node: who is drawn, who is handed on, who is in quarantine, and what is kept on disk."""

import random
import time
from pathlib import Path

import pytest

from worker.swarm.peers import (
    CLOCK_TOLERANCE_SECONDS,
    MAX_PEERS_KNOWN,
    Cache,
    Peers,
    load_cache,
    save_cache,
)
from worker.swarm.wire import Member

OURS = ("reasoning-gym 0.1.25",)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def member(name: str, issued: int | None = None, life: int = 180, environments: tuple[str, ...] = OURS) -> Member:
    issued = int(time.time()) if issued is None else issued
    return Member(name, ("/ip4/127.0.0.1/tcp/1",), 0, 1, issued, issued + life, environments, name.encode())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def peers(clock: Clock) -> Peers:
    return Peers("me", 180.0, OURS, clock)


def draw_all(peers: Peers, seed: int = 1) -> list[str]:
    rng, drawn = random.Random(seed), list[str]()
    while (peer_id := peers.draw(rng, drawn)) is not None:
        drawn.append(peer_id)
    return drawn


def test_every_peer_is_drawn_once_and_never_ourselves(peers: Peers) -> None:
    for name in ("me", "a", "b", "c"):
        peers.learn(member(name), from_itself=True)
    assert sorted(draw_all(peers)) == ["a", "b", "c"]


def test_peer_that_failed_is_drawn_last_until_it_answers(peers: Peers) -> None:
    for name in ("a", "b", "c"):
        peers.learn(member(name), from_itself=True)
    peers.failed("b")
    assert {draw_all(peers, seed)[-1] for seed in range(20)} == {"b"}
    peers.answered("b")
    assert {draw_all(peers, seed)[-1] for seed in range(20)} == {"a", "b", "c"}


def test_peer_that_is_silent_for_a_record_life_is_forgotten(peers: Peers, clock: Clock) -> None:
    peers.learn(member("a"), from_itself=True)
    clock.now += 181
    assert len(peers) == 0
    assert draw_all(peers) == []


def test_only_peers_heard_by_ourselves_are_handed_on(peers: Peers) -> None:
    peers.learn(member("heard"), from_itself=True)
    peers.learn(member("told"), from_itself=False)
    assert peers.sample(random.Random(1), 9, exclude="") == [b"heard"]
    assert peers.to_greet(random.Random(1), 9) == ["told"]


def test_expired_record_counts_only_from_the_peer_itself(peers: Peers) -> None:
    old = member("a", issued=int(time.time()) - 180 - CLOCK_TOLERANCE_SECONDS - 5)
    peers.learn(old, from_itself=False)
    assert len(peers) == 0
    peers.learn(old, from_itself=True)
    assert len(peers) == 1


def test_clock_that_is_minutes_off_does_not_hide_a_peer(peers: Peers) -> None:
    peers.learn(member("slow", issued=int(time.time()) - 300), from_itself=False)
    peers.learn(member("fast", issued=int(time.time()) + 300), from_itself=False)
    assert sorted(draw_all(peers)) == ["fast", "slow"]


def test_older_record_does_not_replace_a_newer_one(peers: Peers) -> None:
    now = int(time.time())
    peers.learn(member("a", issued=now), from_itself=False)
    stale = Member("a", ("/ip4/127.0.0.1/tcp/9",), 0, 1, now - 10, now + 170, OURS, b"stale")
    peers.learn(stale, from_itself=False)
    assert peers.addresses("a") == ("/ip4/127.0.0.1/tcp/1",)


def test_view_is_bounded(peers: Peers, clock: Clock) -> None:
    for i in range(MAX_PEERS_KNOWN + 50):
        clock.now += 0.01
        peers.learn(member(f"p{i}"), from_itself=False)
    assert len(peers) == MAX_PEERS_KNOWN
    assert peers.addresses("p0") == ()


def test_quarantine_grows_and_ends(peers: Peers, clock: Clock) -> None:
    peers.learn(member("liar"), from_itself=True)
    assert [peers.strike("liar") for _ in range(5)] == [0.0, 60.0, 120.0, 240.0, 480.0]
    assert draw_all(peers) == []
    clock.now += 481
    peers.learn(member("liar"), from_itself=True)
    assert draw_all(peers) == ["liar"]


def test_good_groups_make_up_for_a_strike(peers: Peers) -> None:
    peers.strike("a")
    peers.absolve("a")
    assert peers.strike("a") == 0.0


def test_quarantine_has_a_longest_time(peers: Peers) -> None:
    assert max(peers.strike("liar") for _ in range(2000)) == 6 * 3600


def test_cache_survives(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    save_cache(path, 4001, ["/ip4/127.0.0.1/tcp/1/p2p/QmA"])
    assert load_cache(path) == Cache(4001, ("/ip4/127.0.0.1/tcp/1/p2p/QmA",))
    assert [p.name for p in tmp_path.iterdir()] == ["peers.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"port": "x", "peers": []}', '{"port": 1}', "\x00", '{"port":1,"peers":3}']
)
def test_damaged_cache_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "peers.json").write_text(text)
    assert load_cache(tmp_path / "peers.json") == Cache()


def test_missing_cache_is_empty(tmp_path: Path) -> None:
    assert load_cache(tmp_path / "peers.json") == Cache()


def test_peer_of_another_version_is_not_drawn_and_is_named_once(peers: Peers, caplog: pytest.LogCaptureFixture) -> None:
    for issued in (1, 2, 3):
        peers.learn(member("old", issued, environments=("reasoning-gym 0.1.24",)), from_itself=True)
    assert len(caplog.records) == 1
    assert caplog.records[0].levelname == "WARNING"
    assert "peer=old theirs=reasoning-gym 0.1.24 ours=reasoning-gym 0.1.25" in caplog.text
    assert peers.draw(random.Random(1), ()) is None
    assert peers.other_versions() == {"reasoning-gym 0.1.24": 1}
    assert len(peers) == 1


def test_peer_that_was_upgraded_is_drawn(peers: Peers) -> None:
    peers.learn(member("old", 1, environments=("reasoning-gym 0.1.24",)), from_itself=True)
    peers.learn(member("old", 2), from_itself=True)
    assert peers.draw(random.Random(1), ()) == "old"
    assert peers.other_versions() == {}


def test_peer_with_one_environment_in_common_is_drawn_though_another_differs(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    peers = Peers("me", 180.0, ("code 1", "reasoning-gym 0.1.25"), clock)
    peers.learn(member("new", environments=("code 2", "reasoning-gym 0.1.25")), from_itself=True)
    assert peers.draw(random.Random(1), ()) == "new"
    assert peers.other_versions() == {"code 2": 1}
    assert "theirs=code 2" in caplog.text


def test_peer_of_another_environment_is_no_mismatch_and_not_drawn(
    peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    peers.learn(member("coder", environments=("code 1",)), from_itself=True)
    assert peers.draw(random.Random(1), ()) is None
    assert peers.other_versions() == {}
    assert not caplog.records
