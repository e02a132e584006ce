"""The results of a run of pyinfra on each host: last lines for people, a JSON file for programs.

The lines report failures, interruptions, and what deployed hosts lack; programs read the file with
report_file.py.
"""

import atexit
import logging
import os
import signal
import sys
from collections import defaultdict, deque
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from pyinfra import logger
from pyinfra.api.exceptions import DeployError
from pyinfra.api.host import Host
from pyinfra.api.state import BaseStateCallback, State
from pyinfra.context import ctx_state

from deploys import locks
from deploys.pyinfra_ext import fact_cache, report_file, sudo
from deploys.pyinfra_ext.report_file import HostRun, RunReport

INTERRUPTED = 130
DISK_FULL = "No space left on device"
# Number of lines of pyinfra's output per host that are searched for the reason of a failure.
NUM_LINES = 100
# Uninformative lines: pyinfra's own, and systemd's about a service that did not start (the
# service's own lines explain that).
_UNINFORMATIVE = (
    "Error",
    "Connected",
    "Ready",
    "Success",
    "No change",
    "hivewright-",
    "Starting ",
    "Started ",
    "Stopped ",
    "Failed to",
    "Job for ",
    "See ",
    "Loaded fact",
    fact_cache.AT_IT,
)

_notes: list[str] = []
_interruptions: list[int] = []
_lacking: dict[str, list[str]] = defaultdict(list)
_lines: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=NUM_LINES))
_report = RunReport()


def stop(reason: str) -> DeployError:
    """Return the error to raise to stop the run before it changes anything, for this reason."""
    _report.stopped = _report.stopped or reason
    return DeployError("these hosts can't be deployed as they are; the last line says why")


def note(line: str) -> None:
    """Print a line at the end of the run about something that is not a failure."""
    if line not in _notes:
        _notes.append(line)


def problem(host: str, line: str) -> None:
    """Print a line at the end of the run and exit with 1, because the host lacks something."""
    if line not in _lacking[host]:
        _lacking[host].append(line)


def refuse(lines: list[str]) -> None:
    """Print the mistakes in the inventory, as the end of the run."""
    _report.refused += lines
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Print a mistake in the inventory that does not stop the run."""
    _report.warnings.append(line)
    print(line, file=sys.stderr, flush=True)


def report_at_exit() -> None:
    """Report on the run when the process ends; for config.py.

    pyinfra itself ends with exit code 1 if a host failed.
    """
    State.init = _observed(State.init)
    logger.addHandler(_Lines())
    atexit.register(_conclude)


def end_with_130_if_interrupted() -> None:
    """Make SIGINT and SIGTERM end the process with 130; pyinfra alone would end with 0."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    _interruptions.append(number)
    sys.exit(INTERRUPTED)


class _Lines(logging.Handler):
    """Collects pyinfra's log by host: output of failed commands, and connection errors."""

    def emit(self, record: logging.LogRecord) -> None:
        name, is_of_host, line = click.unstyle(record.getMessage()).strip().partition("] ")
        if is_of_host and name.startswith("["):
            _lines[name[1:]].append(line.strip())


class _Observer(BaseStateCallback):
    def operation_start(
        self,
        state: State,
        op_hash: str,
    ) -> None:
        """Record the running operation, since a run that hangs is killed."""
        for host in state.inventory.get_active_hosts():
            if op_hash in state.ops[host]:
                run = _report.hosts.setdefault(host.name, HostRun())
                run.operation = _name(state, op_hash)
        _write()


def _observed(init: Any) -> Any:
    @wraps(init)
    def init_and_observe(
        state: State,
        *arguments: Any,
        **options: Any,
    ) -> None:
        init(state, *arguments, **options)
        state.add_callback_handler(_Observer())

    return init_and_observe


def _write() -> None:
    if file := os.environ.get(report_file.REPORT_VARIABLE):
        _report.write(Path(file))


def _conclude() -> None:
    state: State | None = ctx_state.get()
    state = state if state is not None and state.initialised else None
    if state is not None:
        for host in state.inventory:
            if host in state.activated_hosts or host in state.failed_hosts:
                _report.hosts[host.name] = _run_on(state, host)
    _write()
    sys.stdout.flush()
    for line in _last_lines(state):
        print(line, file=sys.stderr, flush=True)
    if _lacking and not (_interruptions or _report.stopped or (state and state.failed_hosts)):
        # pyinfra would exit with 0, because it has no other code for a run without failed
        # hosts.
        os._exit(1)


def _last_lines(state: State | None) -> list[str]:
    if _interruptions:
        return [_interrupted(state)]
    lines = [f"note: {line}" for line in sorted(_notes)]
    if _report.stopped:
        return [*lines, f"nothing was done on any host: {_report.stopped}"]
    lines += [
        f"done, but {name}: {line}"
        for name, each in sorted(_lacking.items())
        for line in sorted(each)
    ]
    if state is not None and state.failed_hosts:
        failed = sorted(state.failed_hosts, key=lambda host: host.name)
        said = ", ".join(f"{host.name} ({_what_failed(state, host)})" for host in failed)
        lines.append(
            f"failed: {said}; fix these hosts and run again (hosts that succeeded are left"
            " unchanged)"
        )
    return lines


def _run_on(state: State, host: Host) -> HostRun:
    """Return the result of the run on one host."""
    lacking = _lacking.get(host.name, [])
    if host not in state.activated_hosts:
        return HostRun(
            "unreachable", "", sudo.refused.get(host.name) or _explanation(host), lacking
        )
    if _interruptions and not _is_done(state, host):
        return HostRun("failed", _at(state, host), "interrupted", lacking)
    if host not in state.failed_hosts:
        return HostRun("done", "", _explanation(host), lacking)
    operation = _failed_operation(state, host)
    if operation is not None and (lock := _lock_of(state, host, operation)):
        return HostRun("failed", "", lock, lacking)
    name = "a fact could not be read" if operation is None else _name(state, operation)
    return HostRun("failed", f"{name}{_cut_off(host)}", _explanation(host), lacking)


def _explanation(host: Host) -> str:
    """Return the last informative line that pyinfra logged of a host, or one about a full disk."""
    lines = [
        line for line in _lines.get(host.name, ()) if line and not line.startswith(_UNINFORMATIVE)
    ]
    full = [line for line in lines if DISK_FULL in line]
    return (full or lines or [""])[-1]


def _interrupted(state: State | None) -> str:
    """Return a description of the state after an interrupted run."""
    hosts = state.activated_hosts if state is not None else set()
    half_done = sorted(
        (host for host in hosts if fact_cache.is_changed(host)), key=lambda host: host.name
    )
    half_done = [host for host in half_done if state is not None and not _is_done(state, host)]
    if not half_done:
        return "interrupted: no host was left half done; run it again to continue"
    names = ", ".join(
        f"{host.name} (at: {_at(state, host)})" for host in half_done if state is not None
    )
    return (
        f"interrupted: half done: {names}; the others are done or unchanged; run it again to"
        " continue"
    )


def _is_done(state: State, host: Host) -> bool:
    return all(
        operation.operation_meta.is_complete()
        for op_hash in state.get_op_order()
        if (operation := state.ops[host].get(op_hash)) is not None
    )


def _at(state: State, host: Host) -> str:
    """Return the operation that was running, or the next one."""
    for op_hash in state.get_op_order():
        operation = state.ops[host].get(op_hash)
        if operation is not None and not operation.operation_meta.is_complete():
            return _name(state, op_hash)
    return "its end"


def _name(state: State, op_hash: str) -> str:
    return ", ".join(sorted(state.get_op_meta(op_hash).names))


def _what_failed(state: State, host: Host) -> str:
    if host not in state.activated_hosts:
        reason = sudo.refused.get(host.name)
        return f"can't be reached as root: {reason}" if reason else "can't be reached"
    operation = _failed_operation(state, host)
    if operation is None:
        return f"a fact could not be read{_cut_off(host)}"
    return _lock_of(state, host, operation) or f"{_name(state, operation)}{_cut_off(host)}"


def _failed_operation(state: State, host: Host) -> str | None:
    """Return the hash of the operation that failed; None: a fact failed."""
    for op_hash in state.get_op_order():
        operation = state.ops[host].get(op_hash)
        if (
            operation
            and operation.operation_meta.is_complete()
            and operation.operation_meta.did_error()
        ):
            return str(op_hash)
    return None


def _lock_of(
    state: State,
    host: Host,
    op_hash: str,
) -> str | None:
    """Return the owner of the host's lock, if that is why the operation failed."""
    said = str(state.ops[host][op_hash].operation_meta.stderr).strip()
    return said if locks.LOCKED in said else None


def _cut_off(host: Host) -> str:
    client = getattr(host.connector, "client", None)
    transport = client.get_transport() if client is not None else None
    is_cut_off = transport is not None and not transport.is_active()
    return ": the connection was lost" if is_cut_off else ""
