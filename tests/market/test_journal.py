"""The journal of bets: what was written is there after a crash, and counts add up."""

import os
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from statistics import fmean
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import ResourceError
from worker.market import journal as journal_module
from worker.market.journal import OPEN_STATES, UNKNOWN_FAMILY, Journal, Row
from worker.records import BetState

HALL = "0x" + "a" * 40
BET = Row(
    HALL,
    3,
    0,
    99,
    1,
    10**18,
    (0.25, 0.75),
    "planned",
    1000.0,
    family="gcd",
    creation="0xab",
    asked_at=999.0,
    answer="42",
)
STATES = get_args(BetState)


@pytest.fixture
def journal(tmp_path):
    opened = Journal(tmp_path / "bets.db")
    yield opened
    opened.close()


@pytest.mark.parametrize(
    "row",
    [
        BET,
        replace(BET, game=0, round=0, block=0, choice=0, amount=0, beliefs=()),
        replace(BET, game=2**63 - 1, amount=2**256 - 1),
        replace(BET, beliefs=(0.1, 1e-300, 0.9 - 1e-16), reason="why\n\x1b[2J", family=None),
        replace(BET, state="claiming", brier=1.9999999999999998),
    ],
)
def test_row_comes_back_as_it_was(tmp_path, row):
    written = Journal(tmp_path / "bets.db")
    written.add(row)
    written.close()
    again = Journal(tmp_path / "bets.db")
    assert again.open_rows(HALL) == [row]
    again.close()


def test_second_row_of_a_clue_changes_nothing(journal):
    journal.add(BET)
    journal.add(replace(BET, amount=1, choice=0, state="skipped"))
    assert journal.open_rows(HALL) == [BET]
    assert journal.counts() == {"planned": 1}


def test_decision_replaces_what_is_not_known_before_it(journal):
    asked = replace(BET, choice=0, amount=0, beliefs=(), state="skipped", reason="killed")
    journal.add(asked)
    journal.add(replace(asked, round=1))
    journal.decide(BET)
    assert journal.open_rows(HALL) == [BET]
    assert journal.counts() == {"planned": 1, "skipped": 1}


def test_clue_is_known_by_market_game_and_round(journal):
    journal.add(BET)
    assert journal.has(HALL, 3, 0, "0xab")
    for other in (("0x" + "b" * 40, 3, 0), (HALL, 4, 0), (HALL, 3, 1)):
        assert not journal.has(*other, "0xab")


def test_game_that_has_the_number_of_a_lost_one_has_rows_of_its_own(journal):
    journal.add(BET)
    assert not journal.has(HALL, 3, 0, "0xcd")
    other = replace(BET, creation="0xcd", choice=0)
    journal.add(other)
    journal.move(BET, "missed")
    assert journal.open_rows(HALL) == [other]
    assert journal.counts() == {"missed": 1, "planned": 1}


@pytest.mark.parametrize(("known", "asked"), [("", "0xab"), ("0xab", ""), ("", "")])
def test_game_whose_creation_is_not_known_may_be_any(journal, known, asked):
    journal.add(replace(BET, creation=known))
    assert journal.has(HALL, 3, 0, asked)


@pytest.mark.parametrize("state", STATES)
def test_row_is_open_until_the_chain_has_settled_it(journal, state):
    journal.add(BET)
    journal.move(BET, state, "reason")
    found = journal.open_rows(HALL)
    assert bool(found) == (state in OPEN_STATES) == bool(journal.num_open())
    assert journal.counts() == {state: 1}
    assert all(row.reason == "reason" and row.changed_at > BET.changed_at for row in found)


def test_open_rows_are_of_one_market_and_oldest_first(journal):
    rows = [replace(BET, game=game, round=round) for game, round in ((9, 0), (2, 1), (2, 0))]
    for row in [*rows, replace(BET, market="other")]:
        journal.add(row)
    assert [(row.game, row.round) for row in journal.open_rows(HALL)] == [(2, 0), (2, 1), (9, 0)]


def test_note_and_score_leave_the_state_and_its_time(journal):
    journal.add(BET)
    journal.note(BET, "the judge is away")
    journal.rate(BET, 0.5)
    assert journal.open_rows(HALL) == [replace(BET, reason="the judge is away", brier=0.5)]


def test_line_of_a_change_waits_until_it_is_dropped(tmp_path):
    journal = Journal(tmp_path / "bets.db")
    journal.add(BET)
    journal.move(BET, "sent")
    journal.decide(BET, "first")
    journal.move(BET, "lost", line="second")
    journal.close()
    again = Journal(tmp_path / "bets.db")
    (first, text), (second, _) = again.lines()
    assert text == "first"
    again.drop_line(first)
    assert again.lines() == [(second, "second")]
    again.close()


def test_rows_that_ended_are_newest_first_and_without_those_given_up(journal):
    rows = [replace(BET, game=game, state="paid", changed_at=100.0 + game) for game in range(4)]
    rows[1] = replace(rows[1], state="lost")
    rows[2] = replace(rows[2], state="lost", reason="the game did not end")
    others = [replace(BET, game=8, state="missed"), replace(rows[0], market="other")]
    for row in [*rows, *others]:
        journal.add(row)
    assert journal.ended_rows(HALL, 100.0, 9) == [rows[3], rows[1], rows[0]]
    assert journal.ended_rows(HALL, 101.0, 9) == [rows[3], rows[1]]
    assert journal.ended_rows(HALL, 100.0, 1) == [rows[3]]


def test_beliefs_without_a_bet_wait_for_their_score(journal):
    skipped = replace(BET, state="skipped")
    others = [
        replace(BET, game=4, state="skipped", beliefs=()),
        replace(BET, game=5, state="missed", brier=0.5),
        replace(BET, game=6, state="missed", asked_at=1.0),
        replace(BET, game=7, state="confirmed"),
    ]
    for row in [skipped, *others]:
        journal.add(row)
    assert journal.unrated_rows(HALL, 900.0) == [skipped]
    journal.rate(skipped, 0.5)
    assert journal.unrated_rows(HALL, 900.0) == []


def test_other_rows_of_a_game_are_of_the_same_game(journal):
    for row in (
        replace(BET, round=1, state="paid"),
        replace(BET, round=2, state="lost", creation="0xcd"),
        replace(BET, round=2, state="claiming", market="other"),
    ):
        journal.add(row)
    journal.add(BET)
    assert journal.state_of(BET) == "planned"
    found = [state for state in STATES if journal.has_other(BET, state)]
    assert found == ["paid"]


def test_changes_are_of_one_row(journal):
    other = replace(BET, round=1)
    for row in (BET, other):
        journal.add(row)
    journal.move(BET, "lost")
    journal.rate(BET, 2.0)
    journal.note(BET, "x")
    assert journal.open_rows(HALL) == [other]


RATINGS = st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.floats(0, 2) | st.none()))


@settings(max_examples=12)
@given(RATINGS, st.lists(st.sampled_from(STATES)))
def test_counts_and_means_are_those_of_a_list(tmp_path_factory, ratings, states):
    journal = Journal(tmp_path_factory.mktemp("journal") / "bets.db")
    for game, (family, brier) in enumerate(ratings):
        journal.add(replace(BET, game=game, family=family, state="lost"))
        if brier is not None:
            journal.rate(replace(BET, game=game), brier)
    for game, state in enumerate(states):
        journal.add(replace(BET, market="other", game=game, state=state))
    rated = [(family or UNKNOWN_FAMILY, brier) for family, brier in ratings if brier is not None]
    count, mean = journal.mean_brier()
    assert count == len(rated)
    assert mean == (pytest.approx(fmean(brier for _, brier in rated)) if rated else None)
    by_family = {
        family: fmean(brier for other, brier in rated if other == family) for family, _ in rated
    }
    assert journal.brier_by_family() == pytest.approx(by_family)
    counts = Counter(states)
    counts["lost"] += len(ratings)
    assert journal.counts() == {state: count for state, count in counts.items() if count}
    assert journal.num_open() == sum(counts[state] for state in OPEN_STATES)
    journal.close()


def test_families_with_the_most_rows_are_reported(journal, monkeypatch):
    monkeypatch.setattr(journal_module, "_MAX_FAMILIES", 2)
    for game, family in enumerate(["b", "a", "c", "c", "a", "c"]):
        row = replace(BET, game=game, family=family)
        journal.add(row)
        journal.rate(row, float(family == "c"))
    assert journal.brier_by_family() == {"c": 1.0, "a": 0.0}


def test_threads_write_at_once_and_nothing_is_lost(journal):
    def write(first):
        for game in range(first, first + 25):
            row = replace(BET, game=game)
            journal.add(row)
            journal.move(row, "lost")

    threads = [threading.Thread(target=write, args=(first,)) for first in range(0, 100, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journal.counts() == {"lost": 100}


def test_bet_is_on_disk_when_a_process_is_killed_after_writing_it(tmp_path):
    code = (
        "import os, sys, pathlib; from worker.market.journal import Journal, Row;"
        "Journal(pathlib.Path(sys.argv[1])).add(Row('m', 1, 0, 9, 1, 5, (), 'planned', 1.0));"
        "os.kill(os.getpid(), 9)"
    )
    file = tmp_path / "bets.db"
    done = subprocess.run([sys.executable, "-c", code, file], check=False, timeout=60)
    assert done.returncode == -9
    again = Journal(file)
    assert [row.amount for row in again.open_rows("m")] == [5]
    again.close()


@pytest.mark.parametrize("has_families", [False, True])
def test_journal_of_an_earlier_version_is_taken_over(tmp_path, has_families):
    file = tmp_path / "bets.db"
    schema, family = journal_module._FIRST_SCHEMA, ", NULL"
    if not has_families:
        schema, family = schema.replace(", family TEXT", ""), ""
    with sqlite3.connect(file) as old:
        old.executescript(schema)
        values = f"'m', 1, 0, 9, 1, '5', '[]', 'sent', 7.0, NULL, 0.5{family}"
        old.execute(f"INSERT INTO bets VALUES ({values})")
    old.close()
    for _ in range(2):
        journal = Journal(file)
        (row,) = journal.open_rows("m")
        assert row == Row("m", 1, 0, 9, 1, 5, (), "sent", 7.0, None, 0.5, None, "", 7.0)
        assert journal.brier_by_family() == {UNKNOWN_FAMILY: 0.5}
        journal.close()


def test_journal_of_a_later_version_is_named(tmp_path):
    file = tmp_path / "bets.db"
    Journal(file).close()
    with sqlite3.connect(file) as newer:
        newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(ResourceError, match=r"bets\.db: has version 99 of its tables"):
        Journal(file)


@pytest.mark.parametrize("content", [b"x" * 5000, b"SQLite format 3\0" + os.urandom(4080)])
def test_damaged_journal_is_named(tmp_path, content):
    file = tmp_path / "bets.db"
    file.write_bytes(content)
    with pytest.raises(ResourceError, match=r"bets.db") as error:
        Journal(file)
    assert str(error.value).count("\n") == 0
    assert file.read_bytes()[:16] == content[:16]
