"""Weights & Biases, offline (`STATE/logs/wandb`, for `wandb sync`) or online."""

from collections.abc import Mapping
from typing import Any

from worker.runtime.files import read_secret
from worker.settings import Tracking
from worker.telemetry.tracking.run import Run


class _Run:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(
        self,
        round: int,
        figures: Mapping[str, float],
    ) -> None:
        self._run.log(dict(figures), step=round)

    def close(self) -> None:
        self._run.finish()


def read_key(tracking: Tracking) -> str | None:
    """Return the API key; None: none is set. Raises SecretError."""
    if tracking.wandb_key_file is None:
        return None
    return read_secret(
        tracking.wandb_key_file, "an API key of Weights & Biases", "tracking.wandb_key_file"
    )


def open_run(tracking: Tracking, run: Run) -> _Run:
    """Begin or resume the node's run."""
    import wandb

    settings = wandb.Settings(
        api_key=read_key(tracking),
        console="off",
        disable_git=True,
        disable_code=True,
        silent=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
    )
    run.folder.mkdir(parents=True, exist_ok=True)
    return _Run(
        wandb.init(
            project=tracking.project,
            name=run.name,
            id=run.id,
            resume="allow" if tracking.wandb == "online" else None,
            dir=run.folder,
            mode="online" if tracking.wandb == "online" else "offline",
            config=dict(run.settings),
            settings=settings,
        )
    )
