"""Bets on their way, without a chain: what the contract forgets, what can't be read, the record."""

import time
from dataclasses import replace

import pytest

from tests.market.small_market import ADDRESS, PEER, SmallMarket
from worker.chain.market import TOKEN, GameStatus, Guess
from worker.chain.rpc import TooMuch
from worker.errors import ChainUnreachable, ContractRefused
from worker.market import bets as bets_module
from worker.market.bets import Bets
from worker.market.journal import Journal, Row
from worker.market.record import Record

DAY = 86_400.0


class Table:
    """A market, a journal, and the bets of one node between them."""

    def __init__(self, folder, version="hivewright/1") -> None:
        self.file, self.record_file = folder / "bets.db", folder / "logs/prg_record.txt"
        self.market = SmallMarket(version)
        self.start()

    def start(self) -> None:
        """Start the node, also again."""
        self.journal = Journal(self.file)
        record = Record(self.record_file, self.journal)
        self.bets = Bets(self.market, self.market, PEER, self.journal, record)

    def row(self, state="planned", game=0, round=0, **changes) -> Row:
        """Add a row of a bet of a token on choice 0, which is on the chain from `confirmed` on."""
        now = time.time()
        plain = Row(ADDRESS, game, round, 0, 0, TOKEN, (0.8, 0.2), state, now, None)
        row = replace(plain, **{"creation": "0xa", "asked_at": now, "answer": "yes", **changes})
        self.journal.add(row)
        if game not in self.market.games:
            self.market.open(game)
        if state in ("confirmed", "claiming", "paid", "lost"):
            self.market.games[game].bets[round] = Guess(0, TOKEN, TOKEN)
        return row

    def follow(self, times: int = 1) -> dict[str, int]:
        """Look at all rows, also at those that ended; return the number of rows by state."""
        for _ in range(times):
            self.bets._recheck_at = 0.0
            self.bets._look_at.clear()
            self.bets.follow()
        return self.journal.counts()

    def lines(self) -> list[str]:
        """Return the record, without the time stamps."""
        if not self.record_file.exists():
            return []
        return [line.partition("] ")[2] for line in self.record_file.read_text().splitlines()]


@pytest.fixture
def table(tmp_path):
    return Table(tmp_path)


@pytest.fixture
def foreign(tmp_path):
    return Table(tmp_path, None)


# ---- what a restored chain forgets


def test_claim_that_a_restored_chain_forgot_is_made_again(table):
    table.row("confirmed")
    table.market.settle()
    assert table.follow(2) == {"paid": 1}
    table.market.games[0].is_claimed = False
    assert table.follow(3) == {"paid": 1}
    assert (table.market.num_claims, table.market.games[0].is_claimed) == (2, True)


@pytest.mark.parametrize(("right", "state"), [(0, "paid"), (1, "lost")])
def test_result_that_a_restored_chain_forgot_is_waited_for_again(table, right, state):
    table.row("confirmed")
    table.market.settle(right=1)
    assert table.follow() == {"lost": 1}
    table.market.games[0].status = GameStatus.OPEN
    assert table.follow() == {"confirmed": 1}
    table.market.settle(right=right)
    assert table.follow(3) == {state: 1}


def test_paid_bet_that_a_restored_chain_forgot_is_sent_again(table):
    table.row("confirmed")
    table.market.settle()
    assert table.follow(2) == {"paid": 1}
    table.market.open()
    assert table.follow(2) == {"sent": 1}
    table.journal._database.execute("UPDATE bets SET changed_at = 0")
    assert table.follow(2) == {"confirmed": 1}
    assert table.market.games[0].bets[0].bet == TOKEN


def test_results_that_the_chain_still_has_stay(table):
    for game, state in enumerate(("paid", "lost")):
        table.row(state, game)
        table.market.settle(game, right=game)
    table.market.games[0].is_claimed = True
    assert table.follow(2) == {"paid": 1, "lost": 1}
    assert (table.lines(), table.market.num_claims) == ([], 0)


@pytest.mark.parametrize(
    ("age", "is_after_a_start", "is_reopened"),
    [
        (0.0, False, True),
        (3600.0, False, False),
        (3600.0, True, True),
        (2 * DAY, True, False),
    ],
)
def test_results_of_a_while_are_checked_and_of_a_day_after_a_start(
    table, age, is_after_a_start, is_reopened
):
    table.follow()
    table.row("paid", changed_at=time.time() - age)
    if is_after_a_start:
        table.start()
    counts = table.follow()
    assert counts == ({"confirmed": 1} if is_reopened else {"paid": 1})


def test_results_of_a_day_are_checked_at_once_after_an_outage(table):
    table.follow()
    table.row("paid", changed_at=time.time() - 3600.0)
    table.bets.follow()
    assert table.journal.counts() == {"paid": 1}
    table.bets.doubt()
    table.bets.follow()
    assert table.journal.counts() == {"confirmed": 1}


def test_all_results_that_were_forgotten_are_opened_again(table, monkeypatch):
    monkeypatch.setattr(bets_module, "_RECHECK_ROWS", 2)
    for game in range(7):
        table.row("paid", game)
    assert table.follow() == {"confirmed": 7}


# ---- what can't be read


@pytest.mark.parametrize(
    "error", [TooMuch("history has been pruned"), ContractRefused("NotPeersAccount", "another")]
)
def test_bet_that_can_not_be_read_holds_up_no_other(table, error):
    table.row("confirmed", 0)
    table.row("planned", 1)
    table.market.fails[0] = error
    assert table.follow(2) == {"confirmed": 2}
    reasons = {row.game: row.reason for row in table.journal.open_rows(ADDRESS)}
    assert reasons == {0: str(error), 1: None}


def test_chain_that_is_away_is_not_asked_for_each_bet(table):
    for game in range(3):
        table.row("confirmed", game)
        table.market.fails[game] = ChainUnreachable("no answer")
    with pytest.raises(ChainUnreachable):
        table.follow()
    assert table.market.num_reads == 1


@pytest.mark.parametrize(
    ("state", "ends", "words"), [("sent", "missed", "no bet"), ("confirmed", "lost", "lost")]
)
def test_bet_in_a_foreign_game_that_does_not_end_is_given_up_after_a_week(
    foreign, state, ends, words
):
    foreign.row(state, asked_at=time.time() - 6 * DAY, changed_at=time.time() - 6 * DAY)
    assert foreign.follow() == {state: 1}
    foreign.journal._database.execute("UPDATE bets SET asked_at = asked_at - 86401")
    assert foreign.follow(2) == {ends: 1}
    assert foreign.lines() == [f"Game 0 Round 0: {words}: the game did not end within 7 days"]


def test_bet_that_can_not_be_read_for_a_week_is_given_up(foreign):
    foreign.row("confirmed", asked_at=time.time() - 8 * DAY, changed_at=1.0)
    foreign.market.fails[0] = TooMuch("history has been pruned")
    assert foreign.follow(2) == {"lost": 1}


def test_bet_of_a_node_that_was_off_for_long_is_claimed(foreign):
    foreign.row("confirmed", asked_at=time.time() - 30 * DAY, changed_at=1.0)
    foreign.market.settle()
    assert foreign.follow() == {"claiming": 1}
    assert foreign.follow() == {"paid": 1}


def test_old_bet_in_a_foreign_game_is_looked_at_rarely(foreign):
    foreign.row("confirmed", asked_at=time.time() - DAY, changed_at=1.0)
    for _ in range(5):
        foreign.bets.follow()
    after_some = foreign.market.num_reads
    foreign.follow()
    assert after_some == foreign.market.num_reads - after_some  # one look, and one more


# ---- beliefs without a bet


@pytest.mark.parametrize("state", ["skipped", "missed"])
def test_beliefs_are_rated_without_a_bet_too(table, state):
    table.row(state)
    table.row(state, 1, beliefs=())
    table.follow()
    assert table.journal.mean_brier() == (0, None)
    table.market.settle(0, right=1)
    table.market.settle(1)
    table.follow()
    assert table.journal.mean_brier() == (1, pytest.approx(2 * 0.8**2))


def test_beliefs_about_a_game_that_was_replaced_or_cancelled_get_no_score(table):
    table.row("skipped", 0)
    table.row("skipped", 1)
    table.market.open(0, "0xb")
    table.market.settle(0)
    table.market.games[1].status = GameStatus.CANCELLED
    table.market.fails[2] = TooMuch("history has been pruned")
    table.row("skipped", 2)
    table.follow()
    assert table.journal.mean_brier() == (0, None)


def test_beliefs_without_a_bet_are_looked_at_less_and_less_and_not_forever(table):
    table.row("skipped", asked_at=time.time() - 3600.0)
    for _ in range(5):
        table.bets.follow()
    assert table.market.num_reads == 1
    table.row("skipped", 1, asked_at=time.time() - 8 * DAY)
    table.market.settle(1)
    table.follow()
    assert table.journal.mean_brier() == (0, None)


# ---- the record


def test_bet_whose_answer_was_lost_has_its_line(table):
    table.market.is_deaf = True
    row = table.row()
    with pytest.raises(ChainUnreachable):
        table.bets.send(row)
    table.market.is_deaf = False
    assert table.follow(2) == {"confirmed": 1}
    assert table.lines() == ["Game 0 Round 0: placed bet of 1.000 on 'yes'"]


def test_bet_that_the_contract_has_already_has_its_line(table):
    row = table.row()
    table.market.games[0].bets[0] = Guess(0, TOKEN, TOKEN)
    table.bets.send(row)
    assert table.follow(2) == {"confirmed": 1}
    assert table.lines() == ["Game 0 Round 0: placed bet of 1.000 on 'yes'"]


def test_refused_bet_has_one_line(table, monkeypatch):
    def refuse(*_: object) -> str:
        raise ContractRefused("BetTooLarge", "more than the balance")

    monkeypatch.setattr(table.market, "guess_answer", refuse)
    table.bets.send(table.row())
    assert table.follow() == {"missed": 1}
    assert table.lines() == ["Game 0 Round 0: no bet: the contract refused it (BetTooLarge)"]


def test_payment_of_a_game_is_claimed_and_told_once(table):
    """On a slow chain, the second bet is looked at before the claim for the first is mined."""
    table.market.is_slow = True
    for round in range(3):
        table.row("confirmed", round=round)
    table.market.settle()
    table.follow(2)
    assert table.market.num_claims == 1
    table.market.games[0].is_claimed = True
    assert table.follow(2) == {"paid": 3}
    assert table.lines() == ["Game 0 Round 0: claimed 3.000 for the game"]


def test_payment_of_a_game_that_somebody_claimed_by_hand_is_told(table):
    table.row("confirmed")
    table.market.settle()
    table.market.games[0].is_claimed = True
    assert table.follow() == {"paid": 1}
    assert table.lines() == ["Game 0 Round 0: claimed 1.000 for the game"]


def test_refund_is_told(table):
    table.row("confirmed")
    table.market.games[0].status = GameStatus.CANCELLED
    assert table.follow(2) == {"paid": 1}
    assert table.lines() == ["Game 0 Round 0: got back 1.000: the game was cancelled"]


@pytest.mark.parametrize("is_written", [False, True])
def test_line_is_written_once_when_the_node_is_killed_around_it(table, monkeypatch, is_written):
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    where = (Journal, "drop_line") if is_written else (bets_module.Record, "write")
    table.row("confirmed")
    table.market.settle(right=1)
    with monkeypatch.context() as patch:
        patch.setattr(*where, die)
        with pytest.raises(KeyboardInterrupt):
            table.bets._visit(*table.journal.open_rows(ADDRESS))
    assert len(table.lines()) == is_written
    table.start()
    assert table.follow(2) == {"lost": 1}
    assert table.lines() == ["Game 0 Round 0: lost"]


def test_lines_wait_for_a_disk_that_is_full(table, caplog):
    table.record_file.parent.write_text("not a folder")
    table.row("confirmed")
    table.market.settle(right=1)
    assert table.follow(3) == {"lost": 1}
    assert caplog.text.count("record of the prediction market not written") == 1
    table.record_file.parent.unlink()
    table.follow()
    assert table.lines() == ["Game 0 Round 0: lost"]
