"""Python processes that have imported what takes long: forks of one that did nothing else.

Importing takes a second for a service or pyinfra, and five for a worker, so tests that start many
of them, or kill one and start the next, start them here. The interface is that of `subprocess`,
for commands `[sys.executable, "-m", MODULE, ...]` and `[sys.executable, "-c", CODE, ...]`. Such a
process is a child of this one like any other, but it computes with one thread, and `/proc` shows
the command line of the first.
"""

import atexit
import ctypes
import functools
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

from worker.runtime import entry_point

CHECKOUT = Path(__file__).resolve().parents[1]
_MAX_REQUEST_BYTES = 150_000
_IMPORT_SECONDS = 240.0
"""Time limit of the first answer, which comes after the import."""
_PR_SET_CHILD_SUBREAPER = 36
_FORK, _WAIT = os.fork, os.waitpid
"""Those of the system: pyinfra's import puts gevent's in their place."""
_SERVE = "from tests import preloaded; preloaded.serve()"


class Popen(subprocess.Popen[str]):
    """A Python process with text streams that starts with `preload`, a module, imported."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        preload: str,
        *,
        stdin: int | IO[str] | None = None,
        stdout: int | IO[str] | None = None,
        stderr: int | IO[str] | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._preload = preload
        super().__init__(
            list(map(str, arguments)),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env=env,
            text=True,
        )

    def _execute_child(self, *given: Any) -> None:
        """Take the place of fork and exec, in CPython's own class; `given` is in its order."""
        command, cwd, env, pipes = given[0], given[5], given[6], given[10:16]
        p2cread, _, _, c2pwrite, _, errwrite = pipes
        request = {
            "arguments": command[1:],
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
        }
        streams = [own if fd == -1 else fd for own, fd in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = _fork(_server(self._preload), request, streams)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def run(
    arguments: Sequence[str | Path],
    preload: str,
    *,
    timeout: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stderr: int | IO[str] = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    """Run a Python process to its end, without input; return its code and what it printed.

    `stderr`: a file to write to while the process runs, whose text is not returned.
    """
    with Popen(
        arguments,
        preload,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=cwd,
        env=env,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


@functools.cache
def _server(preload: str) -> socket.socket:
    """Start the process that is forked; it ends when this one closes the socket, or ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(theirs.fileno()), preload],
            cwd=CHECKOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # read at the import of torch
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    atexit.register(_stop, ours, process)
    ours.settimeout(_IMPORT_SECONDS)
    return ours


def _stop(server: socket.socket, process: subprocess.Popen[bytes]) -> None:
    server.close()
    process.wait(30)


def _fork(server: socket.socket, request: Mapping[str, Any], streams: Sequence[int]) -> int:
    """Return the process id of a fork of `server`, which becomes a child of this process."""
    content = json.dumps(request).encode()
    assert len(content) <= _MAX_REQUEST_BYTES
    prctl = ctypes.CDLL(None).prctl
    # An orphan becomes the child of its next ancestor that is a "subreaper".
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        socket.send_fds(server, [content], streams)
        answer = server.recv(100)
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0)
    assert answer, "the process that imports has ended; its output is above"
    return int(answer)


def serve() -> None:
    """Import a module, and fork for each request until the socket is closed."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    entry_point.load(f"{sys.argv[2]}:__name__")
    while True:
        content, streams, _, _ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 3)
        if not content:
            return
        reader, writer = os.pipe()
        child = _fork_twice()
        if child is None:
            os.close(writer)
            # Ends when the process in between has ended, too, so that we have our new parent.
            os.read(reader, 1)
            for own, stream in enumerate(streams):
                os.dup2(stream, own)
            for open_file in (*streams, reader):
                os.close(open_file)
            connection.close()
            _end_with(functools.partial(_become, json.loads(content)))
        for open_file in (*streams, reader, writer):
            os.close(open_file)
        connection.send(str(child).encode())


def _fork_twice() -> int | None:
    """Fork, and again in the child, which then ends; return the second one's id, None in itself.

    So the second one gets another parent.
    """
    said, says = os.pipe()
    between = _FORK()
    if between:
        os.close(says)
        child = int(os.read(said, 20))
        os.close(said)
        _WAIT(between, 0)
        return child
    child = _FORK()
    if child:
        os.write(says, str(child).encode())
        os._exit(0)
    os.close(said)
    os.close(says)
    return None


def _end_with(run: Callable[[], None]) -> NoReturn:
    """End as Python does, but leave it to the system to take apart what was imported."""
    code: object = 0
    try:
        run()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def _become(request: Mapping[str, Any]) -> None:
    """Run what a command line asks Python for, in this process."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    more = [place for place in os.environ.get("PYTHONPATH", "").split(":") if place]
    sys.path[1:1] = [place for place in more if place not in sys.path]
    arguments = request["arguments"]
    if arguments[0] == "-W":
        warnings.simplefilter(arguments[1])
        arguments = arguments[2:]
    kind, content, *rest = arguments
    if kind == "-m":
        sys.argv = [content, *rest]
        sys.modules.pop(f"{content}.__main__", None)  # it may be what was preloaded
        runpy.run_module(content, run_name="__main__", alter_sys=True)
    else:
        assert kind == "-c", kind
        sys.argv = ["-c", *rest]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(content, "<string>", "exec"), vars(main))
