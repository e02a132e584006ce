import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from worker.chain.ledger import _COLUMNS, _IS_UNSETTLED, Ledger
from worker.errors import ResourceError

# Records round after round and says so once `record` has returned; ends by itself after 20 s.
WRITER = """
import sys, time
from pathlib import Path
from worker.chain.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
start = time.monotonic()
for round in range(int(sys.argv[2]), 10**9):
    ledger.record(round, 0, "peer", round * 7 % 1000, ["other"])
    print(round, flush=True)
    for row in ledger.unsettled()[:1]:
        ledger.sent(row, "reward", "0x1")
        ledger.confirm(row, "reward", 5)
        ledger.confirm(row, "vote", 5)
    if time.monotonic() > start + 20:
        break
"""

FILLER = """
import resource, sys
from pathlib import Path
from worker.chain.ledger import Ledger
from worker.errors import ResourceError
ledger = Ledger(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
for round in range(10**6):
    try:
        ledger.record(round, 0, "peer" * 10, round, ["x" * 100])
    except ResourceError as error:
        print(error)
        break
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
before = len(ledger.rows())
print(round, before, ledger.record(round, 0, "peer" * 10, round, ["x" * 100]), len(ledger.rows()))
"""


def test_record_keeps_every_field(tmp_path: Path) -> None:
    before = time.time()
    ledger = Ledger(tmp_path / "ledger.db")
    assert ledger.record(3, 0, "me", -412, ["a", "b"])
    (row,) = Ledger(tmp_path / "ledger.db").rows()
    assert (row.round, row.stage, row.peer_id, row.reward, row.winners) == (
        3,
        0,
        "me",
        -412,
        ("a", "b"),
    )
    assert before <= row.earned_at <= time.time()
    assert (row.reward_state, row.vote_state) == ("earned", "earned")
    assert {row.reward_hash, row.reward_sent_at, row.reward_block, row.reward_reason} == {None}
    assert {row.vote_hash, row.vote_sent_at, row.vote_block, row.vote_reason} == {None}


def test_digest_is_kept_and_is_part_of_what_stands_first(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    assert ledger.record(3, 0, "me", 5, [], "ab")
    assert not ledger.record(3, 0, "me", 5, [], "cd")
    assert [row.digest for row in Ledger(tmp_path / "ledger.db").rows()] == ["ab"]


def test_ledger_of_before_digests_is_read_and_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    old = sqlite3.connect(file)
    columns = re.sub(r",\s+digest TEXT", "", _COLUMNS)
    assert columns != _COLUMNS
    old.execute(
        f"CREATE TABLE ledger ({columns}, PRIMARY KEY (round, stage, peer_id)) STRICT, WITHOUT"
        " ROWID"
    )
    old.execute(
        "INSERT INTO ledger VALUES"
        " (1,0,'me',5,'[]',1.5,'confirmed','0x1',1.5,7,NULL,NULL,NULL,NULL,NULL,NULL)"
    )
    old.commit()
    old.close()
    for _ in range(2):
        ledger = Ledger(file)
        assert ledger.record(2, 0, "me", 6, [], "ab")
        assert [(row.round, row.reward_block, row.digest) for row in ledger.rows()] == [
            (1, 7, None),
            (2, None, "ab"),
        ]
        ledger.close()


def test_waiting_counts_what_is_not_queued_and_knows_the_oldest(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    assert ledger.waiting() == (0, None)
    ledger.record(0, 0, "me", 1, [])
    ledger.record(1, 0, "me", 1, [])
    assert ledger.waiting() == (2, ledger.rows()[0].earned_at)
    ledger.queue()
    assert ledger.waiting() == (0, None)


def test_record_without_winners_has_no_vote(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.record(0, 0, "me", 1, [])
    ledger.queue()
    assert ledger.rows()[0].vote_state is None


def test_record_twice_with_the_same_content_changes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.record(0, 0, "me", 5, ["a"])
    ledger.sent(ledger.rows()[0], "reward", "0xabc")
    before = ledger.rows()
    assert ledger.record(0, 0, "me", 5, ["a"])
    assert ledger.rows() == before


@pytest.mark.parametrize(("reward", "winners"), [(6, ["a"]), (5, ["b"]), (5, [])])
def test_record_twice_with_other_content_keeps_the_first(
    tmp_path: Path, reward: int, winners: list[str]
) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.record(0, 0, "me", 5, ["a"])
    before = ledger.rows()
    assert not ledger.record(0, 0, "me", reward, winners)
    assert ledger.rows() == before


def test_states_move_reward_and_vote_apart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    for round in range(3):
        ledger.record(round, 0, "me", round, ["a"])
    ledger.queue()
    first, second, _ = ledger.rows()
    ledger.sent(first, "reward", "0x1")
    ledger.confirm(first, "reward", 7)
    ledger.reject(first, "vote", "WinnerAlreadyVoted by another")
    ledger.sent(second, "vote", "0x2")
    first, second, third = ledger.rows()
    assert (first.reward_state, first.reward_hash, first.reward_block) == ("confirmed", "0x1", 7)
    assert (first.vote_state, first.vote_reason) == ("rejected", "WinnerAlreadyVoted by another")
    assert (second.reward_state, second.vote_state, second.vote_hash) == ("queued", "sent", "0x2")
    assert second.vote_sent_at is not None
    assert ledger.unsettled() == [second, third]
    assert ledger.confirmed(5) == [first]
    assert ledger.counts() == {"earned": 0, "queued": 2, "sent": 0, "confirmed": 1, "rejected": 0}
    ledger.requeue(first, "reward")
    assert (ledger.rows()[0].reward_state, ledger.rows()[0].reward_block) == ("queued", None)


def test_unsettled_reads_the_index_only(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    plan = ledger._database.execute(
        f"EXPLAIN QUERY PLAN SELECT * FROM ledger WHERE {_IS_UNSETTLED} ORDER BY round"
    )
    assert any("USING INDEX unsettled" in step[-1] for step in plan), plan


def test_killed_at_random_points_loses_nothing_that_was_said_to_be_recorded(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    told = -1
    rng = random.Random(0)
    for _ in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file), str(told + 1)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline(), "the writer ended by itself"
        time.sleep(rng.uniform(0, 0.15))
        writer.kill()
        rest, _ = writer.communicate(timeout=10)
        lines = rest.splitlines()
        told = max([told + 1, *(int(line) for line in lines)])
        rows = Ledger(file).rows()
        assert [row.round for row in rows] == list(range(len(rows)))
        assert len(rows) > told
        assert all(row.reward == row.round * 7 % 1000 and row.winners == ("other",) for row in rows)
        told = rows[-1].round
    assert sqlite3.connect(file).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_full_disk_is_a_resource_error_and_loses_no_row(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    done = subprocess.run(
        [sys.executable, "-c", FILLER, str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    message, counts = done.stdout.splitlines()
    assert str(file) in message
    assert "make room" in message
    failed, before, accepted, after = counts.split()
    assert (int(before), accepted, int(after)) == (int(failed), "True", int(failed) + 1)


@pytest.mark.parametrize("content", [b"not a database, but long enough to be looked at" * 50, b""])
def test_file_that_is_no_ledger_is_refused_or_filled(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "ledger.db"
    file.write_bytes(content)
    if not content:
        assert Ledger(file).rows() == []
        return
    with pytest.raises(
        ResourceError,
        match=f"{file}: file is not a database; restore it from a backup, or move it away",
    ):
        Ledger(file)
    assert file.read_bytes() == content


def test_damaged_ledger_is_to_be_restored(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    ledger = Ledger(file)
    for round in range(200):
        ledger.record(round, 0, "me", round, [])
    ledger.close()
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xff" * (size - 4096))
    with pytest.raises(
        ResourceError,
        match="malformed; restore it from a backup, or move it away to begin an empty",
    ):
        Ledger(file).rows()


def test_two_processes_and_many_threads_share_it(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    one, other = Ledger(file), Ledger(file)

    def write(ledger: Ledger, peer_id: str) -> None:
        for round in range(20):
            ledger.record(round, 0, peer_id, round, [])

    threads = [
        threading.Thread(target=write, args=(ledger, f"peer-{i}"))
        for i, ledger in enumerate([one, one, other, other])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(one.rows()) == len(other.rows()) == 80
