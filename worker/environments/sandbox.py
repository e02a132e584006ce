"""Run untrusted programs where they can only compute; refuse if they can't be isolated.

Each `Runner` is a fresh Python interpreter without our modules, environment variables or open files
(sandbox_child.py); each program runs in a fork of it under a seccomp filter: no files, no network,
no processes, no signals, and limited memory, time and output. This needs neither root nor
namespaces nor a package, and works in the systemd unit of a worker. Results are compared in the
parent process, which the program can't reach.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from worker.errors import ResourceError

CPU_SECONDS = 1
"""Processor time of a program; a right one takes milliseconds."""
WALL_SECONDS = 15.0
"""Time of a program on a busy machine, which is slow to give it that second; it can't sleep."""
MEMORY_BYTES = 256 << 20
"""Address space, including the interpreter's own (about 30 MB)."""
OUTPUT_BYTES = 64 << 10
_PATIENCE_SECONDS = 20.0
"""Time of the runner itself, in addition to the program's: start, fork, scheduling."""

# It tries only system calls that the filter of the worker's systemd unit permits. For others, such
# as ptrace, that filter would kill the probe.
_PROBE = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def probe(runner):
    calls = {
        "read a file": lambda: libc.open(b"/proc/self/status", 0),
        "write a file": lambda: libc.open(b"/nowhere/at/all", 0o101, 0o600),
        "make a folder": lambda: libc.mkdir(b"/nowhere/at/all", 0o700),
        "connect to a network": lambda: libc.socket(2, 1, 0),
        "connect locally": lambda: libc.socket(1, 1, 0),
        "execute a program": lambda: libc.execv(b"/nowhere/at/all", None),
        "fork": lambda: libc.fork() or libc._exit(0),
        "signal its parent": lambda: libc.kill(runner, 0),
    }
    refused = 1  # EPERM: the filter's answer, which comes before other checks
    return [name for name, call in calls.items() if call() != -1 or ctypes.get_errno() != refused]
"""


class Runner:
    """A context manager for one interpreter, used by one thread. Its programs are independent."""

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def run(
        self,
        program: str,
        entry: str,
        inputs: Sequence[Sequence[Any]],
    ) -> list[Any] | None:
        """Return the results of `entry` of the program for each of `inputs`.

        A result is JSON text, or None if the call gave none. Returns None for all of them if the
        program took too long, used too much memory, or wrote something else. Raises ResourceError
        if it can't be run in isolation; then it is not run.
        """
        job = json.dumps(
            {
                "program": program,
                "entry": entry,
                "inputs": inputs,
                "cpu_seconds": CPU_SECONDS,
                "wall_seconds": WALL_SECONDS,
                "memory_bytes": MEMORY_BYTES,
                "output_bytes": OUTPUT_BYTES,
            }
        )
        reply = self._ask(job)
        if reply is None:  # the kernel may have killed the process to free memory: try again
            self._stop()
            self._start()
            reply = self._ask(job)
        if reply is None:
            raise ResourceError(
                "sandbox of code tasks: its process ended twice without an answer; free memory"
            )
        if not reply["sealed"] and reply["reason"] != "time":
            raise ResourceError(
                f"sandbox of code tasks: not available on this machine: {reply['reason']}; it needs"
                " Linux with seccomp on x86_64 or aarch64; remove the code/ families from"
                " environment.families"
            )
        return _outputs(reply["outputs"], len(inputs))

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("sandbox_child.py"))],
                cwd="/",
                env={"LANG": "C.UTF-8"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise ResourceError(
                f"sandbox of code tasks: can't be started: {error.strerror}; free memory"
            ) from error

    def _stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(
        self,
        job: str,
    ) -> dict[str, Any] | None:
        """Return the runner's reply. None: it has died, or did not answer in time."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            return None
        try:
            stdin.write(job.encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # the process may have written a reply before it died
        deadline, data = time.monotonic() + WALL_SECONDS + _PATIENCE_SECONDS, b""
        # select() takes no file number above 1023, and a worker may have many connections.
        waiting = select.poll()
        waiting.register(stdout, select.POLLIN)
        while not data.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not waiting.poll(1000 * left):
                return None
            chunk = os.read(stdout.fileno(), 65536)
            if not chunk:
                return None
            data += chunk
        reply: dict[str, Any] = json.loads(data)
        return reply


def require_isolation() -> None:
    """Raise ResourceError unless a program that tries to escape is stopped here."""
    with Runner() as runner:
        outputs = runner.run(_PROBE, "probe", [[runner._process.pid]])
    if outputs != ["[]"]:
        done = (
            "its probe did not run"
            if outputs is None or outputs[0] is None
            else f"a program could {outputs[0]}"
        )
        raise ResourceError(
            f"sandbox of code tasks: does not isolate on this machine: {done}; remove the code/"
            " families from environment.families"
        )


def _outputs(
    text: str | None,
    count: int,
) -> list[Any] | None:
    """Return the results that a program reported, if they are a list of `count` texts or None.

    They are untrusted.
    """
    try:
        outputs = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    if not isinstance(outputs, list) or len(outputs) != count:
        return None
    are_valid = all(output is None or isinstance(output, str) for output in outputs)
    return outputs if are_valid else None
