"""Runs untrusted programs where they can do nothing but compute. Refuses, with one line, where that
can't be had.

Each `Runner` is a fresh Python interpreter without our modules, our environment variables or our
open files (sandbox_child.py); each program runs in a fork of it that a seccomp filter holds: no
files, no network, no processes, no signals, bounded memory, time and output. That needs no root, no
namespaces and no package, and works within the systemd unit of a worker. What a program gave is
compared out here, where it can't reach.
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
"""A right program needs milliseconds."""
WALL_SECONDS = 15.0
"""Only for a machine that is too busy to give it that second: a program can't wait for anything, so
it can't idle."""
MEMORY_BYTES = 256 << 20
"""Address space, the interpreter's own (about 30 MB) included."""
OUTPUT_BYTES = 64 << 10
_PATIENCE_SECONDS = 20.0
"""For the runner itself, beyond the program's time: to start, to fork, to be scheduled."""

# Only calls that the filter of the worker's systemd unit knows: that one would kill the probe for
# others, ptrace say.
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
    refused = 1  # EPERM: the filter's answer, before anybody else has a say
    return [name for name, call in calls.items() if call() != -1 or ctypes.get_errno() != refused]
"""


class Runner:
    """A context: one interpreter, for one thread. Programs that run in it one after the other know
    nothing of each other."""

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

    def run(self, program: str, entry: str, inputs: Sequence[Sequence[Any]]) -> list[Any] | None:
        """Return what `entry` of the program returns for each of `inputs`: JSON text, or None where
        it gave no result.

        None for all of it: the program took too long, used too much, or wrote something else.
        Raises ResourceError if it can't be run in isolation; it is not run then.
        """
        job = json.dumps(
            {
                "program": program, "entry": entry, "inputs": inputs, "cpu_seconds": CPU_SECONDS,
                "wall_seconds": WALL_SECONDS, "memory_bytes": MEMORY_BYTES, "output_bytes": OUTPUT_BYTES,
            }
        )  # fmt: skip
        reply = self._ask(job)
        if reply is None:  # the machine may have killed it for want of memory: once more
            self._stop()
            self._start()
            reply = self._ask(job)
        if reply is None:
            raise ResourceError(
                "sandbox of code tasks: its process ended twice without an answer; free memory"
            )
        if not reply["sealed"] and reply["reason"] != "time":
            raise ResourceError(
                f"sandbox of code tasks: can't be had on this machine: {reply['reason']}; it needs"
                " Linux with seccomp on x86_64 or aarch64; take the code/ families out of"
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

    def _ask(self, job: str) -> dict[str, Any] | None:
        """The runner's reply. None: it has died, or was silent for so long that it had to."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            return None
        try:
            stdin.write(job.encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # it may have left a last word
        deadline, data = time.monotonic() + WALL_SECONDS + _PATIENCE_SECONDS, b""
        waiting = (
            select.poll()
        )  # select() takes no file number above 1023, and a worker may have many connections
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
    """Raise ResourceError unless a program is held here: one is run that tries what none may."""
    with Runner() as runner:
        outputs = runner.run(_PROBE, "probe", [[runner._process.pid]])
    if outputs != ["[]"]:
        done = (
            "its probe did not run"
            if outputs is None or outputs[0] is None
            else f"a program could {outputs[0]}"
        )
        raise ResourceError(
            f"sandbox of code tasks: does not isolate on this machine: {done}; take the code/"
            " families out of environment.families"
        )


def _outputs(text: str | None, count: int) -> list[Any] | None:
    """Return what a program says are its results: untrusted peers' text, so only a list of `count`
    texts or nothings is one."""
    try:
        outputs = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    if not isinstance(outputs, list) or len(outputs) != count:
        return None
    return outputs if all(output is None or isinstance(output, str) for output in outputs) else None
