"""Run programs, always with a time limit: nothing in the lab may wait forever."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class LabError(Exception):
    """The lab could not do what was asked; the message is for people."""


def run(
    *argv: str | Path,
    timeout: float = 30,
    check: bool = True,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program for at most `timeout` seconds. Raises LabError with its output on failure."""
    command = [str(a) for a in argv]
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            env=env,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"no end after {timeout:g} s: {' '.join(command)}") from error
    if check and done.returncode:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise LabError(f"exit {done.returncode}: {' '.join(command)}\n{said}")
    return done


def wait_until(
    condition: Callable[[], bool],
    timeout: float,
    what: str,
    every: float = 0.1,
) -> None:
    """Wait until `condition` is true. Raises LabError with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not within {timeout:g} s")
        time.sleep(every)


# Kept so that they can be reaped when they end.
_started: list[subprocess.Popen[bytes]] = []


def start(
    command: Sequence[str],
    file: Path,
    log: Path,
    stdin: int = subprocess.DEVNULL,
    cwd: Path | None = None,
) -> None:
    """Start a process that outlives this one, and record it in `file` for `recall` and `stop`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=cwd, stdin=stdin, stdout=output, stderr=output, start_new_session=True
        )
    _started.append(process)
    remember(process.pid, file)


def remember(pid: int, file: Path) -> None:
    """Record a process in `file` by pid and start time, so that a reused pid is not mistaken."""
    file.write_text(f"{pid} {_started_at(pid)}")


def recall(file: Path) -> int | None:
    """Return the process id in `file` if that process still runs, else None."""
    try:
        pid, started_at = file.read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    return int(pid) if _started_at(int(pid)) == started_at else None


def stop(file: Path, timeout: float = 10) -> None:
    """End the process recorded in `file`: with SIGTERM first, then with SIGKILL."""
    _end(file, timeout)
    for process in _started:
        process.poll()


def _end(file: Path, timeout: float) -> None:
    for sent in (signal.SIGTERM, signal.SIGKILL):
        pid = recall(file)
        if pid is None:
            return
        os.kill(pid, sent)
        deadline = time.monotonic() + timeout
        while recall(file) is not None and time.monotonic() < deadline:
            time.sleep(0.05)
    if recall(file) is not None:
        raise LabError(f"process {file.read_text()} ({file}) does not end")


def _started_at(pid: int) -> str | None:
    """Return the clock tick at which `pid` started, which identifies it; None: not running."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
