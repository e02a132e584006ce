"""Run `hivewright audit` every N rounds for the keeper, in a separate process.

No round waits for it. It loads packages that the keeper does not need (the libp2p daemon, the task
families), runs at low priority and ends by itself.
"""

import functools
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from worker import settings
from worker.runtime.files import write_whole

log = logging.getLogger(__name__)

AUDIT_FOLDER = "audit"
_START_SECONDS = 120.0
"""Time added to `audit.timeout_seconds` for loading and scoring."""
_NICENESS = 10


class Audits:
    """Start audits with the keeper's `settings`; `folder` gets their report, settings and log."""

    def __init__(
        self,
        settings: settings.Settings,
        folder: Path,
    ) -> None:
        self._settings = settings
        self._folder = settings.audit.state_dir or folder
        if settings.audit.every_rounds:
            # The dashboard's unit mounts the folder at its start, so it must exist by then.
            self._folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._deadline = 0.0
        self._round: int | None = None

    def see(self, round: int) -> None:
        """Start an audit if enough rounds ended since the last one.

        Call this on every poll, with the open round.
        """
        self._look_after()
        every = self._settings.audit.every_rounds
        if not every:
            return
        if self._round is None:
            self._round = round
        elif round >= self._round + every and self._process is None:
            self._round = round
            self._start()

    def close(self) -> None:
        """Kill a running audit; the last complete report stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        file = self._folder / "settings.yaml"
        write_whole(file, settings.dump(self._settings), mode=0o600)
        options = ["--settings", str(file), "--output", str(self._folder)]
        with (self._folder / "audit.log").open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker", "audit", *options],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(os.nice, _NICENESS),
            )
        self._deadline = time.monotonic() + self._settings.audit.timeout_seconds + _START_SECONDS

    def _look_after(self) -> None:
        if self._process is None:
            return
        code = self._process.poll()
        if code is not None:
            self._process = None
            self._tell(code)
        elif time.monotonic() > self._deadline:
            log.warning("audit took too long and was killed log=%s", self._folder / "audit.log")
            self.close()

    def _tell(self, code: int) -> None:
        try:
            lines = (self._folder / "audit.log").read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        if code:
            log.warning("audit failed code=%d %s", code, lines[-1][:300] if lines else "")
        else:
            found = [line for line in lines if line.startswith("contradicted")]
            for line in found:
                log.warning("%s", line)
            log.info(
                "audit done contradicted=%d report=%s", len(found), self._folder / "audit.json"
            )
