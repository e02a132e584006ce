"""Push the model to the Hugging Face Hub every N rounds, in a separate process.

The files are those of a finished checkpoint. A round never waits for a push and never fails because
of one: a failed push is logged and reported in the status, and the next push is tried when it is
due. The uploading process (upload.py) has a deadline and ends with the worker.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from worker import settings
from worker.errors import SettingsError
from worker.log import discreet
from worker.runtime.files import read_secret
from worker.runtime.state_dir import StateDir

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class HubStatus:
    """The state of the last push.

    `round`: the round of that push; `error`: why it failed; `pushed_round`: the newest on the Hub.
    """

    repo: str
    state: Literal["waiting", "uploading", "pushed", "failed"] = "waiting"
    round: int | None = None
    pushed_round: int | None = None
    failures: int = 0
    error: str | None = None


class Hub:
    """Pushes of one node.

    If the repository in the settings is only OWNER, it becomes OWNER/`name`. Raises SettingsError
    for a token file without a token, which only a person can fix.
    """

    def __init__(
        self,
        hub: settings.Hub,
        state_dir: Path,
        name: str,
        rounds_trained: int,
    ) -> None:
        if hub.repo is None or hub.token_file is None:
            raise SettingsError("hub: repo and token_file are both needed to push to the Hub")
        read_secret(hub.token_file, "a Hugging Face token that may write", "hub.token_file")
        self._settings = hub
        self._token_file = hub.token_file
        self._folder = StateDir(state_dir).hub
        self._attempted = rounds_trained
        self._process: subprocess.Popen[bytes] | None = None
        self._deadline = 0.0
        self._status = HubStatus(hub.repo if "/" in hub.repo else f"{hub.repo}/{name}")

    def is_due(self, rounds_trained: int) -> bool:
        """Return whether a multiple of `every_rounds` has passed since the last push or attempt."""
        every = self._settings.every_rounds
        return rounds_trained // every > self._attempted // every

    def push(
        self,
        rounds_trained: int,
        round: int,
        weights: Path | None,
        describe: Callable[[Path], None],
    ) -> None:
        """Start to upload the file of `weights` and the files that `describe` writes next to it.

        Returns without waiting for the upload. `weights` None: `describe` writes them too, which
        takes as long as the disk needs. While the last push is still running, this one is skipped
        with a warning.
        """
        self._attempted = rounds_trained
        if self.status().state == "uploading":
            log.warning(
                "push skipped, the last one is still running round=%d uploading=%s",
                round,
                self._status.round,
            )
            return
        self._change(state="uploading", round=round, error=None)
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            files = self._folder / "files"
            files.mkdir(parents=True)
            if weights is not None:
                # A hard link: the file outlives the checkpoint and takes no space.
                os.link(weights, files / "model.safetensors")
            describe(files)
            self._start(files)
        except Exception as error:  # noqa: BLE001 - no round fails because of a push
            self._fail(f"{type(error).__name__}: {error}")

    def status(self) -> HubStatus:
        """Return the state of the push, after checking on the uploading process."""
        if self._process is not None:
            code = self._process.poll()
            if code is not None:
                self._process = None
                self._finish(code)
            elif time.monotonic() > self._deadline:
                self._kill()
                self._fail(
                    f"not done after {self._settings.timeout_seconds:g} s (hub.timeout_seconds)"
                )
        return self._status

    def flush(self, seconds: float) -> None:
        """Wait for a running push, for at most `seconds`."""
        deadline = time.monotonic() + seconds
        while self.status().state == "uploading" and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """End a running push."""
        if self._process is not None:
            self._kill()
            self._fail("the worker stopped before it was done")

    def _start(self, files: Path) -> None:
        self._deadline = time.monotonic() + self._settings.timeout_seconds
        order = {
            "parent": os.getpid(),
            "folder": str(files),
            "repo": self._status.repo,
            "private": self._settings.private,
            "endpoint": self._settings.endpoint,
            "token_file": str(self._token_file),
            "message": f"round {self._status.round}",
        }
        (self._folder / "order.json").write_text(json.dumps(order))
        with (self._folder / "upload.log").open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.hub.upload", str(self._folder / "order.json")],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only the worker, which then ends it
            )

    def _finish(self, code: int) -> None:
        if code != 0:
            self._fail(self._last_output(code))
            return
        self._change(state="pushed", pushed_round=self._status.round, error=None)
        log.info("pushed to the hub round=%d repo=%s", self._status.round, self._status.repo)

    def _last_output(self, code: int) -> str:
        try:
            output = (self._folder / "upload.log").read_text(errors="replace")
            lines = output.strip().splitlines()
        except OSError:
            lines = []
        return lines[-1][:300] if lines else f"the upload ended with {code}"

    def _fail(self, reason: str) -> None:
        reason = discreet(reason)
        self._change(state="failed", failures=self._status.failures + 1, error=reason)
        log.warning(
            "push to the hub failed, trying again in %d rounds round=%s repo=%s error=%s",
            self._settings.every_rounds,
            self._status.round,
            self._status.repo,
            reason,
        )

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _change(self, **changes: object) -> None:
        self._status = replace(self._status, **changes)  # type: ignore[arg-type]
