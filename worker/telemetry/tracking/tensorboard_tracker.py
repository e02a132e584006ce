"""TensorBoard: event files in `STATE/logs/tensorboard` (`tensorboard --logdir`)."""

from collections.abc import Mapping
from typing import Any

from worker.settings import Tracking
from worker.telemetry.tracking.run import Run


class _Writer:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(
        self,
        round: int,
        figures: Mapping[str, float],
    ) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def open_run(tracking: Tracking, run: Run) -> _Writer:
    """Return a writer of event files; a restart adds a file to the same folder."""
    from tensorboardX import SummaryWriter

    folder = run.folder / "tensorboard" / tracking.project / run.name
    return _Writer(SummaryWriter(str(folder)))
