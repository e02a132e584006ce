import time

from worker.errors import ChainUnreachable
from worker.rounds import ChainClock, LocalClock, Pace, Tick


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
