"""The keeper's audits: every N rounds `hivewright audit`, in a process of its own that no round
waits for.

It loads what the keeper does without (the libp2p daemon, the task families), at low priority, and
ends by itself.
"""

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
"""Besides `audit.timeout_seconds`: for loading, and for scoring."""
_NICENESS = 10


class Audits:
    """Audits with `settings`, those of the keeper; `folder` gets report, settings and log."""

    def __init__(self, settings: settings.Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = settings.audit.state_dir or folder
        if settings.audit.every_rounds:
            # There from the start: the dashboard's service is shown it when it starts, or never.
            self._folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._deadline = 0.0
        self._round: int | None = None

    def see(self, round: int) -> None:
        """The round is open: audit, if enough have ended since the last time. To be called at every
        look."""
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
        """End an audit that is going on; its report stays as it was."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        file = self._folder / "settings.yaml"
        write_whole(file, settings.dump(self._settings), mode=0o600)
        with (self._folder / "audit.log").open("w") as output:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "worker",
                    "audit",
                    "--settings",
                    file,
                    "--output",
                    self._folder,
                ],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_step_back,
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
            log.warning("audit takes too long and is ended log=%s", self._folder / "audit.log")
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


def _step_back() -> None:
    os.nice(_NICENESS)
