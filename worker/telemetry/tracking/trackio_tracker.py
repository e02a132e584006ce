"""trackio: a database in `STATE/logs/trackio`, shown by `trackio show`; no vendor, no account."""

import io
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, redirect_stdout
from typing import Any

from worker.settings import Tracking
from worker.telemetry.tracking.run import Run


class _Run:
    def __init__(self, module: Any) -> None:
        self._trackio = module

    def log(
        self,
        round: int,
        figures: Mapping[str, float],
    ) -> None:
        self._trackio.log(dict(figures), step=round)

    def close(self) -> None:
        with _quiet():
            self._trackio.finish()


def open_run(tracking: Tracking, run: Run) -> _Run:
    """Begin or resume the node's run. trackio reads its folder from the environment."""
    folder = run.folder / "trackio"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRACKIO_DIR"] = str(folder)
    import trackio

    with _quiet():
        trackio.init(
            project=tracking.project,
            name=run.name,
            resume="allow",
            config=dict(run.settings),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    return _Run(trackio)


def _quiet() -> AbstractContextManager[object]:
    """Drop trackio's printed messages: a service's output must consist of log lines."""
    return redirect_stdout(io.StringIO())
