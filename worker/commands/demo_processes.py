"""Child processes of `hivewright demo`: each has a settings file and a log; none outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from worker.errors import DemoFailed
from worker.runtime.processes import die_with_parent

STOP_SECONDS = 15.0


class Child:
    """A process `hivewright COMMAND --settings FILE`. `ends`: it ends by itself, with code 0."""

    def __init__(
        self,
        command: str,
        settings_file: Path,
        name: str,
        log: Path,
        ends: bool,
    ) -> None:
        self.name = name
        self.log = log
        self.ends = ends
        self._parent = os.getpid()
        with log.open("w") as stream:
            words = [*command.split(), "--settings", str(settings_file)]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker", *words],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                # In a session of its own, so that Ctrl-C reaches only the demo, which then stops
                # its children in order.
                start_new_session=True,
                preexec_fn=self._die_with_parent,
            )

    def _die_with_parent(self) -> None:
        """End the child when the demo ends, even by SIGKILL."""
        if not die_with_parent(self._parent, signal.SIGTERM):
            os._exit(1)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float) -> None:
        """Wait for a command that ends by itself. Raises DemoFailed if it fails or takes longer."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise DemoFailed(
                f"{self.name}: not done after {seconds:.0f} s; its log is {self.log}"
            ) from None
        if code != 0:
            raise DemoFailed(self.last_words())

    def wait_for_file(self, file: Path, seconds: float) -> str:
        """Return the text of `file`, which the child writes when it is ready to serve."""
        deadline = time.monotonic() + seconds
        while not file.exists():
            if not self.is_running:
                raise DemoFailed(self.last_words())
            if time.monotonic() > deadline:
                raise DemoFailed(
                    f"{self.name}: not ready after {seconds:.0f} s, no {file}; its log is"
                    f" {self.log}"
                )
            time.sleep(0.05)
        return file.read_text().strip()

    def last_words(self) -> str:
        """Return the exit code and the last line of the log, or the signal that killed it."""
        if self.process.returncode < 0:
            killer = signal.Signals(-self.process.returncode).name
            return f"{self.name} was killed by {killer}, not by the demo; its log is {self.log}"
        lines = self.log.read_text(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "no output"
        return f"{self.name} ended with {self.process.returncode}: {reason} ({self.log})"


class Children:
    """All children of one demo; leaving the `with` block ends them, youngest first."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self.by_name: dict[str, Child] = {}

    def start(
        self,
        command: str,
        settings_file: Path,
        name: str,
        ends: bool = False,
    ) -> Child:
        child = Child(command, settings_file, name, self._logs / f"{name}.log", ends)
        self.by_name[name] = child
        return child

    def require_healthy(self) -> None:
        """Raise DemoFailed if a child failed, or ended unexpectedly."""
        for child in self.by_name.values():
            code = child.process.poll()
            if code is not None and (code != 0 or not child.ends):
                raise DemoFailed(child.last_words())

    def __enter__(self) -> "Children":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ask all to stop, youngest first, and kill those that do not stop in time."""
        for child in reversed(self.by_name.values()):
            if child.is_running:
                child.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for child in self.by_name.values():
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
