"""Feed trackers through queues, so that a slow or broken tracker never delays a round."""

import importlib.util
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from worker.errors import SettingsError
from worker.log import discreet
from worker.runtime.outage import Outage
from worker.settings import Tracking
from worker.telemetry.status import RoundRecord
from worker.telemetry.tracking import tensorboard_tracker, trackio_tracker, wandb_tracker
from worker.telemetry.tracking.figures import of_round
from worker.telemetry.tracking.run import Run

log = logging.getLogger(__name__)

MAX_WAITING = 1000
"""Number of rounds that may wait for a slow tracker; further ones are left out."""
CLOSE_SECONDS = 10.0


class Tracker(Protocol):
    """The interface of a tracker's module. Every method may raise any error."""

    def log(
        self,
        round: int,
        figures: Mapping[str, float],
    ) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Feed:
    """One tracker with its queue and its thread, which opens it and writes to it."""

    name: str
    make: Callable[[], Tracker]
    waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = field(
        default_factory=lambda: queue.Queue(MAX_WAITING)
    )
    outage: Outage = field(default_factory=lambda: Outage(log))
    thread: threading.Thread | None = None

    def start(self) -> None:
        self.thread = threading.Thread(target=self._run, name=f"track-{self.name}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        tracker: Tracker | None = None
        while (entry := self.waiting.get()) is not None:
            try:
                tracker = tracker or self.make()
                tracker.log(*entry)
            except BaseException as error:  # noqa: BLE001 - errors of a library; no round fails because of them
                self._fail(error)
            else:
                self.outage.end("tracker works again name=%s", self.name)
        if tracker is not None:
            try:
                tracker.close()
            except BaseException as error:  # noqa: BLE001
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.outage.begin(
            "tracker fails, training continues without it name=%s error=%s",
            self.name,
            discreet(f"{type(error).__name__}: {error}"),
        )


class Trackers:
    """The trackers that the settings name; without any it does nothing."""

    def __init__(self, feeds: Iterable[_Feed]) -> None:
        self._feeds = tuple(feeds)
        for feed in self._feeds:
            feed.start()

    def log(self, record: RoundRecord) -> None:
        """Queue a round for every tracker; returns at once."""
        figures = of_round(record) if self._feeds else {}
        for feed in self._feeds:
            try:
                feed.waiting.put_nowait((record.round, figures))
            except queue.Full:
                feed.outage.begin(
                    "tracker is too slow, rounds are left out name=%s waiting=%d",
                    feed.name,
                    MAX_WAITING,
                )

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let all trackers finish, for at most `seconds`."""
        deadline = time.monotonic() + seconds
        for feed in self._feeds:
            try:
                feed.waiting.put_nowait(None)
            except queue.Full:
                log.warning("tracker not finished name=%s", feed.name)
        for feed in self._feeds:
            if feed.thread is not None:
                feed.thread.join(max(0.0, deadline - time.monotonic()))


def open_all(tracking: Tracking, run: Run) -> Trackers:
    """Return the trackers in the settings.

    Raises SettingsError if the package of one is not installed, or its key can't be read.
    """
    feeds = []
    for name, package, is_on, make in (
        ("trackio", "trackio", tracking.trackio, trackio_tracker.open_run),
        ("wandb", "wandb", tracking.wandb != "off", wandb_tracker.open_run),
        ("tensorboard", "tensorboardX", tracking.tensorboard, tensorboard_tracker.open_run),
    ):
        if is_on:
            _require(package, name)
            feeds.append(_Feed(name, _bound(make, tracking, run)))
    if tracking.wandb != "off":
        wandb_tracker.read_key(tracking)
    return Trackers(feeds)


def _bound(
    make: Callable[[Tracking, Run], Tracker], tracking: Tracking, run: Run
) -> Callable[[], Tracker]:
    return lambda: make(tracking, run)


def _require(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise SettingsError(
            f"tracking.{name}: the package {package} is not installed; install the extra"
            " (`uv pip install 'hivewright[trackers]'`), or switch it off"
        )
