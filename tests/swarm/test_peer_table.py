"""The peer table of a node: draws, relayed records, quarantine, and the cache on disk."""

import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from worker import settings
from worker.swarm.discovery import peer_cache
from worker.swarm.discovery.peer_cache import Cache
from worker.swarm.discovery.peer_table import (
    CLOCK_TOLERANCE_SECONDS,
    GOOD_PER_STRIKE,
    HEARSAY_PLACES,
    LEAST_PREFERENCE,
    LEAST_TRUST,
    MAX_PEERS_KNOWN,
    TRUST_DOUBLES_SECONDS,
    Peers,
)
from worker.swarm.log_throttle import MAX_LOGGED_PER_MINUTE
from worker.swarm.protocol.messages import VERSION, Member

SECTION = settings.Swarm(announce_every_seconds=60.0)
OURS = ("reasoning-gym 0.1.25",)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def member(
    name: str,
    issued: int | None = None,
    life: int = 180,
    environments: tuple[str, ...] = OURS,
    families: frozenset[bytes] = frozenset(),
    round: int = 0,
) -> Member:
    issued = int(time.time()) if issued is None else issued
    addresses = ("/ip4/127.0.0.1/tcp/1",)
    return Member(
        name, addresses, round, 1, issued, issued + life, environments, families, name.encode()
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def peers(clock: Clock) -> Peers:
    return Peers("me", SECTION, OURS, clock=clock)


def count_draws(peers: Peers, draws: int = 2000) -> dict[str, float]:
    rng = random.Random(1)
    counts = Counter(peers.draw(rng, ()) for _ in range(draws))
    return {name: counts[name] / draws for name in counts if name is not None}


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
    stale = Member(
        "a", ("/ip4/127.0.0.1/tcp/9",), 0, 1, now - 10, now + 170, OURS, frozenset(), b"stale"
    )
    peers.learn(stale, from_itself=False)
    assert peers.addresses("a") == ("/ip4/127.0.0.1/tcp/1",)


def test_view_is_bounded(peers: Peers, clock: Clock) -> None:
    for i in range(MAX_PEERS_KNOWN + 50):
        clock.now += 0.01
        peers.learn(member(f"p{i}"), from_itself=False)
    assert len(peers) == MAX_PEERS_KNOWN
    assert peers.addresses("p0") == ()


def test_peers_that_we_were_only_told_of_displace_none_that_we_met(
    peers: Peers, clock: Clock
) -> None:
    honest = {f"honest{i}" for i in range(10)}
    for name in honest:
        peers.learn(member(name), from_itself=True)
    for i in range(502):
        clock.now += 0.001
        peers.learn(member(f"told{i}"), from_itself=False)

    def count_rounds(num_draws: int) -> int:
        rng, found = random.Random(1), 0
        for _ in range(100):
            drawn: list[str] = []
            while len(drawn) < num_draws and (peer_id := peers.draw(rng, drawn)) is not None:
                drawn.append(peer_id)
            found += not honest.isdisjoint(drawn)
        return found

    assert count_rounds(4) >= 97
    assert count_rounds(12) == 100
    for i in range(600):
        clock.now += 0.001
        peers.learn(member(f"more{i}"), from_itself=False)
    assert honest <= set(peers.known())
    assert len(peers) == MAX_PEERS_KNOWN
    assert count_rounds(12) == 100


def test_peer_that_we_were_only_told_of_is_drawn_now_and_then(peers: Peers) -> None:
    for name in "abcdefgh":
        peers.learn(member(name), from_itself=True)
    peers.learn(member("new"), from_itself=False)
    assert count_draws(peers)["new"] == pytest.approx(0.25, abs=0.05)


def test_new_peers_come_into_a_view_that_is_full_of_peers_that_we_met(
    peers: Peers, clock: Clock
) -> None:
    for i in range(MAX_PEERS_KNOWN):
        clock.now += 0.001
        peers.learn(member(f"met{i}"), from_itself=True)
    for i in range(2 * HEARSAY_PLACES):
        clock.now += 0.001
        peers.learn(member(f"told{i}"), from_itself=False)
        assert f"told{i}" in peers.known()
    assert sum(name.startswith("told") for name in peers.known()) == HEARSAY_PLACES


def test_peers_that_spoke_to_us_are_greeted_again_among_many_that_we_were_told_of(
    peers: Peers, clock: Clock
) -> None:
    for name in "abcdefgh":
        peers.learn(member(name), from_itself=True)
    for i in range(400):
        peers.learn(member(f"told{i}"), from_itself=False)
    clock.now += 100  # more than half of a record's life
    one, other = peers.to_greet(random.Random(1), 8)
    assert one in set("abcdefgh")
    assert other.startswith("told")


def test_peer_that_put_its_clock_right_is_seen_as_it_is_now(peers: Peers) -> None:
    now = int(time.time())

    def record(issued: int, port: int) -> Member:
        return replace(member("a", issued=issued), addresses=(f"/ip4/127.0.0.1/tcp/{port}",))

    peers.learn(record(now + 300, 1), from_itself=True)
    peers.learn(record(now, 2), from_itself=True)
    assert peers.addresses("a") == ("/ip4/127.0.0.1/tcp/2",)
    peers.learn(record(now + 300, 1), from_itself=False)  # others still hand it on
    assert peers.addresses("a") == ("/ip4/127.0.0.1/tcp/2",)
    peers.learn(record(now + 301, 3), from_itself=False)
    assert peers.addresses("a") == ("/ip4/127.0.0.1/tcp/3",)


def test_many_peers_of_other_versions_do_not_fill_the_log(
    peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(200):
        peers.learn(member(f"old{i}", environments=("reasoning-gym 0.1.24",)), from_itself=False)
        peers.speaks(f"older{i}", 2)
    assert len(caplog.records) == MAX_LOGGED_PER_MINUTE + 1
    assert "further messages about peers are omitted" in caplog.text
    assert peers.other_versions() == {"reasoning-gym 0.1.24": 200, "exchange 2": 200}


def test_version_that_the_full_log_had_no_room_for_is_logged_later(
    peers: Peers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers._throttle, "may", lambda: False)
    issued = int(time.time())
    old = ("reasoning-gym 0.1.24",)
    peers.learn(member("late", issued, environments=old), from_itself=True)
    assert not caplog.records
    monkeypatch.undo()
    for later in (1, 2):
        peers.learn(member("late", issued + later, environments=old), from_itself=True)
    assert caplog.text.count("runs another version") == 1


def test_quarantine_grows_and_ends(peers: Peers, clock: Clock) -> None:
    peers.learn(member("liar"), from_itself=True)
    assert [peers.strike("liar") for _ in range(5)] == [0.0, 60.0, 120.0, 240.0, 480.0]
    assert draw_all(peers) == []
    clock.now += 481
    peers.learn(member("liar"), from_itself=True)
    assert draw_all(peers) == ["liar"]


def test_several_good_answers_make_up_for_a_strike(peers: Peers) -> None:
    peers.strike("a")
    for _ in range(GOOD_PER_STRIKE):
        peers.absolve("a")
    assert peers.strike("a") == 0.0
    assert peers._conduct["a"].strikes == 1


def test_peer_that_lies_every_other_time_is_quarantined(peers: Peers) -> None:
    seconds = []
    for _ in range(10):
        seconds.append(peers.strike("a"))
        peers.absolve("a")
    assert seconds[:4] == [0.0, 60.0, 120.0, 240.0]


def test_strikes_of_many_keys_are_bounded(peers: Peers) -> None:
    for i in range(2 * MAX_PEERS_KNOWN):
        peers.strike(f"p{i}")
    assert len(peers._conduct) == MAX_PEERS_KNOWN


def test_quarantine_has_a_longest_time(peers: Peers) -> None:
    assert max(peers.strike("liar") for _ in range(2000)) == 6 * 3600


def test_cache_survives(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    kept = Cache(4001, ("/ip4/127.0.0.1/tcp/1/p2p/QmA",), ("/ip4/127.0.0.1/tcp/2/p2p/QmB",))
    peer_cache.save(path, kept)
    assert peer_cache.load(path) == kept
    assert [p.name for p in tmp_path.iterdir()] == ["peers.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"port": "x", "peers": []}',
        '{"port": 1}',
        "\x00",
        '{"port":1,"peers":3}',
        "[" * 200_000,
        '{"port": Infinity, "peers": []}',
        '{"port": 1e999, "peers": []}',
        f'{{"port": 1, "peers": ["{"x" * 300_000}"]}}',
    ],
    ids=range(11),
)
@pytest.mark.usefixtures("usual_recursion_limit")
def test_damaged_cache_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "peers.json").write_text(text)
    assert peer_cache.load(tmp_path / "peers.json") == Cache()


def test_missing_cache_is_empty(tmp_path: Path) -> None:
    assert peer_cache.load(tmp_path / "peers.json") == Cache()


def test_peer_of_another_version_is_not_drawn_and_is_named_once(
    peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
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
    peers = Peers("me", SECTION, ("code 1", "reasoning-gym 0.1.25"), clock=clock)
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


def test_peer_with_more_of_our_families_is_drawn_more_often(clock: Clock) -> None:
    ours = frozenset({b"aaaa", b"bbbb", b"cccc", b"dddd"})
    peers = Peers("me", settings.Swarm(draw_families=1.0), OURS, ours, clock)
    peers.learn(member("all", families=ours | {b"eeee"}), from_itself=True)
    peers.learn(member("half", families=frozenset({b"aaaa", b"bbbb"})), from_itself=True)
    peers.learn(member("none", families=frozenset({b"eeee"})), from_itself=True)
    shares = count_draws(peers)
    assert shares["all"] == pytest.approx(1 / 1.6, abs=0.05)
    assert shares["half"] == pytest.approx(0.5 / 1.6, abs=0.05)
    assert shares["none"] == pytest.approx(LEAST_PREFERENCE / 1.6, abs=0.03)


def test_peer_heard_of_lately_is_drawn_more_often(clock: Clock) -> None:
    peers = Peers("me", SECTION.model_copy(update={"draw_fresh": 1.0}), OURS, clock=clock)
    peers.learn(member("old"), from_itself=True)
    clock.now += 90  # half of a record's life
    peers.learn(member("new"), from_itself=True)
    assert count_draws(peers)["old"] == pytest.approx(0.5 / 1.5, abs=0.05)


def test_peer_whose_groups_have_no_signal_is_drawn_less_and_may_improve(clock: Clock) -> None:
    peers = Peers("me", SECTION.model_copy(update={"draw_useful": 1.0}), OURS, clock=clock)
    for name in ("good", "dull"):
        peers.learn(member(name), from_itself=True)
    for _ in range(20):
        peers.rate("good", 1.0)
        peers.rate("dull", 0.0)
    assert count_draws(peers)["dull"] == pytest.approx(
        LEAST_PREFERENCE / (1 + LEAST_PREFERENCE), abs=0.03
    )
    for _ in range(20):
        peers.rate("dull", 1.0)
    assert count_draws(peers)["dull"] == pytest.approx(0.5, abs=0.05)


def test_peer_with_planted_text_is_drawn_far_less_than_dull_ones_until_it_stops(
    clock: Clock,
) -> None:
    """All groups of the planter have a signal, and one in four of the others."""
    peers = Peers("me", settings.Swarm(), OURS, clock=clock)
    others = [f"honest-{number}" for number in range(7)]
    names = ["planter", *others]
    rng, num_drawn = random.Random(1), Counter[str]()
    for _ in range(300):  # rounds of a minute, four peers each
        clock.now += 60
        drawn: list[str] = []
        for name in names:
            peers.learn(member(name), from_itself=True)
        while len(drawn) < 4 and (peer_id := peers.draw(rng, drawn)):
            drawn.append(peer_id)
            num_drawn[peer_id] += 1
            peers.rate(peer_id, 1.0 if peer_id == "planter" else 0.25)
        if "planter" in drawn:
            peers.distrust("planter")
    honest = [num_drawn[name] for name in others]
    assert num_drawn["planter"] < 0.1 * min(honest)
    clock.now += 8 * TRUST_DOUBLES_SECONDS
    for name in names:
        peers.learn(member(name), from_itself=True)
    assert count_draws(peers)["planter"] > 1 / 8


def test_distrust_is_bounded_and_outlives_a_record(clock: Clock) -> None:
    peers = Peers("me", SECTION, OURS, clock=clock)
    for _ in range(100):
        peers.distrust("planter")
    peers.learn(member("planter"), from_itself=True)
    assert peers._weigh("planter", clock()) == LEAST_TRUST
    for number in range(MAX_PEERS_KNOWN):
        peers.distrust(str(number))
    assert peers._weigh("planter", clock()) == 1


def test_weights_of_zero_draw_evenly(clock: Clock) -> None:
    even = SECTION.model_copy(update={"draw_families": 0.0, "draw_fresh": 0.0, "draw_useful": 0.0})
    peers = Peers("me", even, OURS, frozenset({b"aaaa"}), clock)
    peers.learn(member("a", families=frozenset({b"aaaa"})), from_itself=True)
    peers.learn(member("b"), from_itself=True)
    peers.rate("b", 0.0)
    assert count_draws(peers)["a"] == pytest.approx(0.5, abs=0.05)


def test_only_listed_peers_are_drawn(clock: Clock) -> None:
    peers = Peers("me", SECTION.model_copy(update={"only_peers": ("friend",)}), OURS, clock=clock)
    for name in ("friend", "outsider"):
        peers.learn(member(name), from_itself=True)
    assert draw_all(peers) == ["friend"]
    assert [peers.is_allowed(name) for name in ("friend", "outsider")] == [True, False]
    assert len(peers) == 2  # untrusted peers still help to find others


def test_only_registered_peers_are_drawn_once_the_chain_has_named_them(clock: Clock) -> None:
    peers = Peers("me", SECTION.model_copy(update={"only_registered": True}), OURS, clock=clock)
    for name in ("registered", "outsider"):
        peers.learn(member(name), from_itself=True)
    assert draw_all(peers) == []
    peers.allow_registered(["registered", "unknown"])
    assert draw_all(peers) == ["registered"]


def test_peer_that_speaks_another_version_is_counted_and_named_once(
    peers: Peers, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        peers.speaks("old", 2)
    assert peers.other_versions() == {"exchange 2": 1}
    assert len(caplog.records) == 1
    assert f"peer=old theirs=2 ours={VERSION}: upgrade the older of the two" in caplog.text
    clock.now += 181
    assert peers.other_versions() == {}


def test_peer_that_refuses_us_is_drawn_last_until_it_changes_its_mind(
    peers: Peers, clock: Clock
) -> None:
    for name in "abc":
        peers.learn(member(name), from_itself=True)
    peers.close("a")
    assert not peers.is_open("a")
    assert all(draw_all(peers, seed)[-1] == "a" for seed in range(20))
    peers.open("a")
    assert peers.is_open("a")
    peers.close("a")
    clock.now += 181
    peers.answered("a")
    assert peers.is_open("a")  # it may have changed its settings since


def test_few_are_greeted_once_enough_spoke_to_us(peers: Peers) -> None:
    for name in "abcdefghijklmnop":
        peers.learn(member(name), from_itself=False)
    rng = random.Random(1)
    for name in "abcdefg":
        peers.answered(name)
    assert len(peers.to_greet(rng, 8)) == 8
    peers.answered("h")
    assert len(peers.to_greet(rng, 8)) == 2
    assert set(peers.to_greet(rng, 8)) <= set("ijklmnop")
