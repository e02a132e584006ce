"""A thread with one event loop, and calls into it from other threads."""

import asyncio
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from worker.errors import SwarmError

STOP_TIMEOUT_SECONDS = 15.0

T = TypeVar("T")


class Unanswered(SwarmError):
    """The event loop did not answer in time: it, or the whole machine, is too busy."""


class EventLoopThread:
    """Runs one coroutine until `stop`; other threads give it work with `post` and `call`."""

    def __init__(self, name: str) -> None:
        self.stopping = asyncio.Event()
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(
        self,
        main: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """Run `main` in the background; it must return soon after `stopping` is set."""
        # Not asyncio's default policy: hivemind may set that to uvloop's.
        loop = self._loop = asyncio.SelectorEventLoop()

        def run() -> None:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(main())

        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Set `stopping` and wait for the thread's end. Safe to call twice."""
        if self._thread is not None and self._thread.is_alive():
            self.post(self.stopping.set)
            self._thread.join(timeout=STOP_TIMEOUT_SECONDS)

    def post(
        self,
        action: Callable[..., object],
        *arguments: Any,
    ) -> None:
        """Schedule a call in the event loop. Raises SwarmError if the loop is not running."""
        self._running().call_soon_threadsafe(action, *arguments)

    def post_or_run(
        self,
        action: Callable[..., object],
        *arguments: Any,
    ) -> None:
        """Schedule a call as `post` does; if there is no event loop yet, call it now."""
        if self._loop is None:
            action(*arguments)
        else:
            self.post(action, *arguments)

    def call(
        self,
        work: Coroutine[Any, Any, T],
        timeout_seconds: float,
    ) -> T:
        """Run a coroutine in the event loop and return its result.

        Raises Unanswered after `timeout_seconds`, SwarmError if the loop is not running.
        """
        try:
            loop = self._running()
        except SwarmError:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result(timeout_seconds)
        except TimeoutError:
            if future.done():  # a timeout of the coroutine itself
                raise
            future.cancel()
            raise Unanswered(
                f"the swarm's event loop did not answer within {timeout_seconds:g} s; it is busy at"
                f" {self._find_place()}"
            ) from None

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None or self._loop.is_closed():
            raise SwarmError(
                "the swarm is not running: start() comes first, and nothing after close()"
            )
        return self._loop

    def _find_place(self) -> str:
        """Return the code location that the thread is executing, which keeps it from answering."""
        frames = sys._current_frames()
        thread_id = self._thread.ident if self._thread is not None else None
        frame = frames.get(thread_id) if thread_id is not None else None
        if frame is None:
            return "its end"
        innermost = traceback.extract_stack(frame)[-3:]
        return " > ".join(f"{Path(f.filename).name}:{f.lineno}" for f in innermost)
