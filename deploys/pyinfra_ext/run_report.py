"""The last line of a run that failed on some hosts, or was interrupted: their names, and what went wrong there."""

import atexit
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from pyinfra.api.exceptions import DeployError
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import ctx_state

from deploys import locks
from deploys.pyinfra_ext import fact_cache, sudo

INTERRUPTED = 130
_reasons: list[str] = []
_notes: list[str] = []
_interruptions: list[int] = []
_problems: list[str] = []
DONE_BUT = "done, but "


def stop(reason: str) -> DeployError:
    """The error to raise to stop the run before it does anything; the last line will be the reason."""
    _reasons.append(reason)
    return DeployError("these hosts can't be deployed as they are; the last line says why")


def note(line: str) -> None:
    """Have a line printed at the end of the run: nothing failed, but a person should know."""
    if line not in _notes:
        _notes.append(line)


def problem(line: str) -> None:
    """Have a line printed at the end of the run, and exit code 1: hosts are deployed, without something wanted."""
    if line not in _problems:
        _problems.append(line)


def name_failed_hosts_at_exit() -> None:
    """Print that line when the process ends; pyinfra itself ends with exit code 1 if a host failed."""
    atexit.register(_name_failed_hosts)


def end_with_130_if_interrupted() -> None:
    """Have Ctrl-C, or SIGTERM, end the process with 130: pyinfra alone would end with 0, as if all were done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    _interruptions.append(number)
    sys.exit(INTERRUPTED)


def _name_failed_hosts() -> None:
    state: State | None = ctx_state.get()
    if _interruptions:
        sys.stdout.flush()
        print(_interrupted(state), file=sys.stderr, flush=True)
        return
    for line in sorted(_notes):
        print(f"note: {line}", file=sys.stderr)
    if _reasons:
        sys.stdout.flush()
        print(f"nothing was done on any host: {_reasons[0]}", file=sys.stderr, flush=True)
        return
    for line in sorted(_problems):
        print(f"{DONE_BUT}{line}", file=sys.stderr, flush=True)
    if state is None or not state.initialised or not state.failed_hosts:
        if _problems:
            sys.stdout.flush()
            # pyinfra has ended with 0 by now, and knows of no other code for a run without failed hosts.
            os._exit(1)
        return
    failed = sorted(state.failed_hosts, key=lambda host: host.name)
    said = ", ".join(f"{host.name} ({_what_failed(state, host)})" for host in failed)
    sys.stdout.flush()
    print(f"failed: {said}; fix that and run again, hosts that are done stay as they are", file=sys.stderr, flush=True)


def _interrupted(state: State | None) -> str:
    """What an interrupted run has left behind."""
    hosts = state.activated_hosts if state is not None and state.initialised else set()
    half_done = sorted((host for host in hosts if fact_cache.is_changed(host)), key=lambda host: host.name)
    half_done = [host for host in half_done if state is not None and not _is_done(state, host)]
    if not half_done:
        return "interrupted: no host was left half done; run it again to go on"
    names = ", ".join(f"{host.name} (at: {_at(state, host)})" for host in half_done if state is not None)
    return f"interrupted: half done: {names}; the others are done or as they were; run it again to go on"


def _is_done(state: State, host: Host) -> bool:
    return all(
        operation.operation_meta.is_complete()
        for op_hash in state.get_op_order()
        if (operation := state.ops[host].get(op_hash)) is not None
    )


def _at(state: State, host: Host) -> str:
    """The operation that was under way, or came next."""
    for op_hash in state.get_op_order():
        operation = state.ops[host].get(op_hash)
        if operation is not None and not operation.operation_meta.is_complete():
            return ", ".join(sorted(state.get_op_meta(op_hash).names))
    return "its end"


def _what_failed(state: State, host: Host) -> str:
    if host not in state.activated_hosts:
        reason = sudo.refused.get(host.name)
        return f"can't be reached as root: {reason}" if reason else "can't be reached"
    lost = ": the connection was lost" if _is_cut_off(host) else ""
    for op_hash in state.get_op_order():
        operation = state.ops[host].get(op_hash)
        if operation and operation.operation_meta.is_complete() and operation.operation_meta.did_error():
            if locks.LOCKED in operation.operation_meta.stderr:
                return str(operation.operation_meta.stderr).strip()
            return ", ".join(sorted(state.get_op_meta(op_hash).names)) + lost
    return f"a fact could not be read{lost}"


def _is_cut_off(host: Host) -> bool:
    client = getattr(host.connector, "client", None)
    transport = client.get_transport() if client is not None else None
    return transport is not None and not transport.is_active()
