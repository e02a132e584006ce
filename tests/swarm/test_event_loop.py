"""A thread with an event loop: calls into it, and what they raise when it does not answer."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from worker.errors import SwarmError
from worker.swarm import event_loop
from worker.swarm.event_loop import EventLoopThread, Unanswered


class Runner:
    """An event loop thread whose coroutine waits for `stopping`."""

    def __init__(self) -> None:
        self.thread = EventLoopThread("test loop")
        self.ended = threading.Event()

    async def main(self) -> None:
        await self.thread.stopping.wait()
        self.ended.set()


@pytest.fixture
def runner() -> Iterator[Runner]:
    runner = Runner()
    runner.thread.start(runner.main)
    yield runner
    runner.thread.stop()


async def name_of_thread() -> str:
    await asyncio.sleep(0)
    return threading.current_thread().name


def test_work_runs_in_the_loop_s_thread_and_its_result_comes_back(runner: Runner) -> None:
    assert runner.thread.call(name_of_thread(), 10) == "test loop"
    done = threading.Event()
    runner.thread.post(done.set)
    assert done.wait(10)


def test_error_of_the_work_is_raised_to_the_caller(runner: Runner) -> None:
    async def fail() -> None:
        raise KeyError("no such peer")

    with pytest.raises(KeyError, match="no such peer"):
        runner.thread.call(fail(), 10)


def test_timeout_of_the_work_itself_is_not_the_loop_s(runner: Runner) -> None:
    async def give_up() -> None:
        raise TimeoutError("a peer was slow")

    with pytest.raises(TimeoutError, match="a peer was slow"):
        runner.thread.call(give_up(), 10)


def test_busy_loop_is_reported_with_its_place_and_the_work_cancelled(runner: Runner) -> None:
    began, free = threading.Event(), threading.Event()
    ran = []

    def keep_busy() -> None:
        began.set()
        free.wait(20)

    async def late() -> None:
        await asyncio.sleep(0.01)
        ran.append("late")

    runner.thread.post(keep_busy)
    assert began.wait(10)
    with pytest.raises(Unanswered, match=r"within 0.05 s; it is busy at .*threading.py:\d+"):
        runner.thread.call(late(), 0.05)
    free.set()
    assert runner.thread.call(asyncio.sleep(0.05, "free again"), 10) == "free again"
    assert ran == []


def test_stop_ends_the_coroutine_and_may_come_twice(runner: Runner) -> None:
    runner.thread.stop()
    assert runner.ended.is_set()
    runner.thread.stop()


def test_calls_before_the_start_and_after_the_stop_are_refused(runner: Runner) -> None:
    runner.thread.stop()
    for thread in (EventLoopThread("not started"), runner.thread):
        work = name_of_thread()
        with pytest.raises(SwarmError, match="the swarm is not running"):
            thread.call(work, 1)
        assert work.cr_frame is None  # closed, so that Python does not warn that it was never run
        with pytest.raises(SwarmError, match="the swarm is not running"):
            thread.post(print)


def test_action_runs_at_once_only_before_the_start() -> None:
    runner, seen = Runner(), list[str]()
    thread = runner.thread

    def note() -> None:
        seen.append(threading.current_thread().name)

    thread.post_or_run(note)
    assert seen == [threading.current_thread().name]
    thread.start(runner.main)
    thread.post_or_run(note)
    thread.stop()
    assert seen[1:] == ["test loop"]


def test_stop_does_not_wait_forever_for_a_coroutine_that_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_loop, "STOP_TIMEOUT_SECONDS", 0.05)
    thread, free = EventLoopThread("stays"), threading.Event()

    async def stay() -> None:
        while not free.is_set():
            await asyncio.sleep(0.01)

    thread.start(stay)
    began = time.monotonic()
    thread.stop()
    assert time.monotonic() - began < 5
    free.set()
