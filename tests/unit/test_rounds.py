"""The number of the current round, from a chain that may be away, behind or slow."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import BadAnswer, ChainError, ChainUnreachable
from worker.rounds import OPEN_FOR_LONG, PATIENCE, ChainClock, LocalClock, Pace, Tick


class ScriptedChain:
    """Answers `current_round` with one value after the other; an exception is raised."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def current_round(self):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def current_stage(self):
        return 0


def test_clock_waits_for_a_later_round_and_joins_the_current_one():
    waited = []
    clock = ChainClock(ScriptedChain(4, 4, 9), poll_seconds=0.001)
    assert clock.next(4, waiting=lambda: waited.append(1)) == Tick(9, 0)
    assert len(waited) == 2


def test_unreachable_chain_is_a_state_and_ends_by_itself():
    clock = ChainClock(ScriptedChain(ChainUnreachable("no answer"), 3), poll_seconds=0.001)
    assert clock.next(-1, waiting=lambda: None) is None
    assert clock.reachable is False
    assert clock.next(-1, waiting=lambda: None) == Tick(3, 0)
    assert clock.reachable is True


def test_chain_that_was_restored_to_an_older_round_is_not_waited_for(caplog):
    clock = ChainClock(ScriptedChain(3, 3, 8), poll_seconds=0.001)
    assert clock.next(7, waiting=lambda: None) is None
    assert clock.next(7, waiting=lambda: None) is None
    assert clock.next(7, waiting=lambda: None) == Tick(8, 0)
    assert caplog.text.count("chain is behind") == 1


def test_deadline_ends_the_wait():
    clock = ChainClock(ScriptedChain(*[1] * 1000), poll_seconds=0.001)
    tick = clock.next(1, waiting=lambda: None, deadline=time.monotonic() + 0.01)
    assert tick == Tick(1, 0)


def test_node_waits_a_little_for_the_next_round_unless_the_last_one_stayed_open() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])

    def play(open_seconds: float) -> float:
        """A round of which the first part takes 8 s; return the patience after it."""
        now[0] += 8
        pace.finish(0, 8.0)
        patience = pace.patience()
        now[0] += open_seconds
        pace.see_open()
        return patience

    assert [play(seconds) for seconds in (1, 20, 3, 1)] == [2, 2, 0, 2]
    pace.finish(1, 8.0)
    assert pace.patience() == 0


def test_local_clock_counts():
    assert LocalClock().next(6, waiting=lambda: None) == Tick(7, 0)


@pytest.mark.parametrize("error", [ChainUnreachable("away"), BadAnswer("<html>")])
def test_outage_is_logged_at_its_start_and_its_end(caplog, error):
    caplog.set_level("INFO", "worker.rounds")
    clock = ChainClock(ScriptedChain(error, error, 3, error, 4), poll_seconds=0.001)
    ticks = [clock.next(2, waiting=lambda: None) for _ in range(5)]
    assert [tick and tick.round for tick in ticks] == [None, None, 3, None, 4]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"] * 2


def test_chain_that_refuses_is_no_outage():
    clock = ChainClock(ScriptedChain(ChainError("another chain")), poll_seconds=0.001)
    with pytest.raises(ChainError, match="another chain"):
        clock.next(1, waiting=lambda: None)


def test_stage_is_part_of_the_tick():
    chain = ScriptedChain(5)
    chain.current_stage = lambda: 2
    assert ChainClock(chain, 0.001).next(4, waiting=lambda: None) == Tick(5, 2)


def test_deadline_that_has_passed_asks_once():
    chain = ScriptedChain(1, 1)
    tick = ChainClock(chain, 60.0).next(1, waiting=lambda: None, deadline=time.monotonic())
    assert tick == Tick(1, 0)
    assert len(chain.answers) == 1


def test_warning_of_a_chain_that_is_behind_comes_again_after_it_caught_up(caplog):
    clock = ChainClock(ScriptedChain(3, 3, 8, 5, 5), poll_seconds=0.001)
    for after in (7, 7, 7, 9, 9):
        clock.next(after, waiting=lambda: None)
    assert caplog.text.count("chain is behind") == 2


def test_waiting_is_called_at_each_look_so_that_the_watchdog_is_fed():
    looks = []
    clock = ChainClock(ScriptedChain(1, 1, 1, 2), poll_seconds=0.0)
    clock.next(1, waiting=lambda: looks.append(1))
    assert len(looks) == 3
    LocalClock().next(1, waiting=lambda: looks.append(1))
    assert len(looks) == 4


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 500)), min_size=1, max_size=8))
def test_patience_is_a_share_of_a_part_or_nothing(rounds):
    now = [0.0]
    pace = Pace(lambda: now[0])
    open_before = 0.0
    for seconds, stays_open in rounds:
        now[0] += seconds
        pace.finish(0, seconds)
        is_slow = open_before >= OPEN_FOR_LONG * seconds
        assert pace.patience() == (0.0 if is_slow else pytest.approx(PATIENCE * seconds))
        reported = now[0]
        now[0] += stays_open
        pace.see_open()
        open_before = now[0] - reported


def test_no_step_waits_twice_in_a_round():
    pace = Pace(itertools.count().__next__)
    pace.finish(0, 100.0)
    assert pace.patience() > 0
    for part in (1, 2):
        pace.finish(part, 100.0)
        assert pace.patience() == 0
    pace.finish(0, 100.0)
    assert pace.patience() > 0
