"""The dashboard's store: each log entry counts once, and what is damaged is made again."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from worker.chain.coordinator import Event
from worker.dashboard import history, store
from worker.dashboard.counts import Peer
from worker.dashboard.store import SPAN_ROUNDS, Store, reading

ACCOUNT = "0x" + "11" * 20


def reward(peer_id: str, round: int, amount: int, block: int = 1, stage: int = 0) -> Event:
    said = {"roundNumber": round, "stageNumber": stage, "peerId": peer_id, "reward": amount}
    return Event("RewardSubmitted", {**said, "account": ACCOUNT}, block, f"0x{block:064x}")


def rounds(store: Store) -> list[tuple[int, float, int]]:
    with reading(store.file) as connection:
        rows = history.last_rounds(connection, 100)
    return [(row["round"], row["mean"], row["peers"]) for row in reversed(rows)]


@pytest.fixture
def filled(tmp_path: Path) -> Store:
    found = Store(tmp_path)
    with found.writing():
        found.take(reward("QmA", 1, 500, block=10), 3)
        found.take(reward("QmB", 1, 100, block=11), 3)
        found.take(reward("QmA", 2, 300, block=20), 3)
        for block in (10, 15, 20):
            found.add_block(block, f"0x{block}")
        found.set_mark("next/RewardSubmitted", 21)
    return found


def test_rewards_are_summed_by_round_and_by_peer(filled: Store) -> None:
    assert rounds(filled) == [(1, 300.0, 2), (2, 300.0, 1)]
    with reading(filled.file) as connection:
        peer = history.peer(connection, "QmA")
        assert peer is not None
        assert history.peer_curve(connection, peer["number"]) == {
            "round": [1, 2],
            "mean": [500, 300],
        }
        assert history.num_peers(connection) == 2
        (newest, *_) = history.transactions(connection, 0).rows
    assert (newest["peer_id"], newest["round"], newest["detail"]) == ("QmA", 2, "300")


def test_blocks_that_are_gone_are_taken_back(filled: Store) -> None:
    with filled.writing():
        filled.cut_back(10)
    assert rounds(filled) == [(1, 500.0, 1)]
    assert filled.mark("next/RewardSubmitted") == 11
    assert filled.blocks() == [(10, "0x10")]
    with filled.writing():
        filled.take(reward("QmB", 1, 300, block=12), 3)
    assert rounds(filled) == [(1, 400.0, 2)]


def test_old_rewards_stay_as_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "RECENT_ROUNDS", 50)
    found = Store(tmp_path)
    with found.writing():
        for number in range(3 * SPAN_ROUNDS):
            found.take(reward("QmA", number, 200 + number // SPAN_ROUNDS), number)
        found.forget_old(3 * SPAN_ROUNDS - 1)
    with reading(found.file) as connection:
        curve = history.peer_curve(connection, 1)
        assert history.transactions(connection, 0, peer=1).total == 50
    assert curve["round"][:3] == [0, SPAN_ROUNDS, 2 * SPAN_ROUNDS + 50]
    assert curve["mean"][:2] == [200, 201]
    assert len(rounds(found)) == 100


def test_amounts_of_a_lying_contract_are_cut(tmp_path: Path) -> None:
    found = Store(tmp_path)
    with found.writing():
        found.take(reward("QmA", 1, 10**30), 1)
        found.take(reward("QmB", 1, -(10**30), stage=2**255), 1)
        found.put_peers({"QmA": Peer(total=10**40, rewards={1: 10**30})}, {"QmA": None})
    with reading(found.file) as connection:
        (best, *_) = history.peers(connection, "total", False, "", 0, "total_reward").rows
    assert (best["total"], best["last_reward"]) == (2**52, 2**52)
    assert rounds(found) == [(1, 0.0, 2)]


@pytest.mark.parametrize("damage", ["removed", "garbage", "cut", "page", "empty", "other"])
def test_lost_or_damaged_store_is_made_again(filled: Store, tmp_path: Path, damage: str) -> None:
    filled.close()
    content = bytearray(filled.file.read_bytes())
    if damage == "removed":
        filled.file.unlink()
    elif damage == "other":
        with sqlite3.connect(filled.file) as other:
            other.execute("PRAGMA user_version = 99")
    else:
        content[100:4000] = os.urandom(3900)
        damaged = {
            "garbage": os.urandom(5000),
            "cut": bytes(content[: len(content) // 2]),
            "page": bytes(content),
            "empty": b"",
        }
        filled.file.write_bytes(damaged[damage])
    again = Store(tmp_path)
    assert again.is_new
    assert again.mark("next/RewardSubmitted") is None
    with again.writing():
        again.take(reward("QmA", 1, 500), 1)
    assert rounds(again) == [(1, 500.0, 1)]


@pytest.mark.parametrize("damage", ["removed", "replaced"])
def test_store_that_goes_away_while_it_is_open_is_made_again(filled: Store, damage: str) -> None:
    filled.ensure_whole()
    assert rounds(filled) != []
    filled.file.unlink()
    if damage == "replaced":
        filled.file.write_bytes(b"garbage" * 1000)
    filled.ensure_whole()
    assert filled.is_new or damage == "replaced"
    assert filled.mark("next/RewardSubmitted") is None
    assert rounds(filled) == []


def test_search_takes_text_as_it_is(filled: Store) -> None:
    with reading(filled.file) as connection:
        for search, expected in (("QmA", 1), ("qm", 2), ("%", 0), ("_", 0), ("\\", 0), ("'", 0)):
            found = history.peers(connection, "name", True, search, 0, "total_reward")
            assert found.total == expected, search


def test_curves_are_bounded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_CURVES", 2)
    found = Store(tmp_path)
    with found.writing():
        found.add_figures(1, [("family/gcd", 0.5), ("family/lcm", 0.25), ("family/more", 1.0)])
        found.add_figures(1, [("family/gcd", 0.25)])
        found.add_figures(2**80, [("family/gcd", 0.25)])
    with reading(found.file) as connection:
        told = history.curves(connection, "family")
    assert told == {"round": [1], "series": {"gcd": [0.375], "lcm": [0.25]}}


WRITER = """
import sys
from pathlib import Path
from tests.pages.test_store import reward
from worker.dashboard.store import Store
store = Store(Path(sys.argv[1]))
first = store.mark("next/RewardSubmitted") or 1
for block in range(first, 1_000_000):
    with store.writing():
        for peer in range(20):
            store.take(reward(f"Qm{peer}", block, 100, block), block)
        store.set_mark("next/RewardSubmitted", block + 1)
    if block == first:
        print("writes", flush=True)
"""


def test_kill_9_while_it_is_written_counts_each_entry_once(tmp_path: Path) -> None:
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path.cwd()) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
        found = Store(tmp_path)
        assert not found.is_new
        last = found.mark("next/RewardSubmitted") - 1
        with reading(found.file) as connection:
            (newest, *_) = history.last_rounds(connection, 1)
        assert (newest["round"], newest["mean"], newest["peers"]) == (last, 100.0, 20)
        found.close()
