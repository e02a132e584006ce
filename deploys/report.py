"""The last line of a run that failed on some hosts: their names, and what went wrong there."""

import atexit
import sys

from pyinfra.api.exceptions import DeployError
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import ctx_state

_reasons: list[str] = []
_notes: list[str] = []


def stop(reason: str) -> DeployError:
    """The error to raise to stop the run before it does anything; the last line will be the reason."""
    _reasons.append(reason)
    return DeployError("these hosts can't be deployed as they are; the last line says why")


def note(line: str) -> None:
    """Have a line printed at the end of the run: nothing failed, but a person should know."""
    if line not in _notes:
        _notes.append(line)


def name_failed_hosts_at_exit() -> None:
    """Print that line when the process ends; pyinfra itself ends with exit code 1 if a host failed."""
    atexit.register(_name_failed_hosts)


def _name_failed_hosts() -> None:
    state: State | None = ctx_state.get()
    for line in sorted(_notes):
        print(f"note: {line}", file=sys.stderr)
    if _reasons:
        sys.stdout.flush()
        print(f"nothing was done on any host: {_reasons[0]}", file=sys.stderr, flush=True)
        return
    if state is None or not state.initialised or not state.failed_hosts:
        return
    failed = sorted(state.failed_hosts, key=lambda host: host.name)
    said = ", ".join(f"{host.name} ({_what_failed(state, host)})" for host in failed)
    sys.stdout.flush()
    print(f"failed: {said}; mend that and run again, hosts that are done stay as they are", file=sys.stderr, flush=True)


def _what_failed(state: State, host: Host) -> str:
    if host not in state.activated_hosts:
        return "can't be reached"
    lost = ": the connection was lost" if _is_cut_off(host) else ""
    for op_hash in state.get_op_order():
        operation = state.ops[host].get(op_hash)
        if operation and operation.operation_meta.is_complete() and operation.operation_meta.did_error():
            return ", ".join(sorted(state.get_op_meta(op_hash).names)) + lost
    return f"a fact could not be read{lost}"


def _is_cut_off(host: Host) -> bool:
    client = getattr(host.connector, "client", None)
    transport = client.get_transport() if client is not None else None
    return transport is not None and not transport.is_active()
