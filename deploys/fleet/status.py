"""`hivewright fleet status INVENTORY`: one table of all hosts, workers and keepers of the fleet."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploys import fleet_facts, progress
from deploys.fleet import commands, pyinfra_process, queries
from deploys.inventory.derived_settings import roles_of
from deploys.inventory.host_plan import COORDINATORS, WORKERS
from deploys.inventory.schema import parse_slots
from deploys.services import units_of, worker_unit
from deploys.tailscale import tailnet
from worker.errors import WorkerError
from worker.log import printable
from worker.runtime import tailscale_key
from worker.runtime.cells import add_row, cell, say

Row = Mapping[str, str | Text]

ASK_SECONDS = 120.0
# A worker without a report for this many seconds needs attention.
SILENT_SECONDS = 300.0
# Less free space than this, in 10^6 bytes, needs attention too: a checkpoint is that large.
LOW_DISK_MB = 2000
# A keeper may take this much longer than twice its limit to end a round (as monitoring/alerts.yml).
SLACK_SECONDS = 60.0
# A host's clock may differ from ours by this many seconds plus the time that its answer takes.
CLOCK_SECONDS = 30.0
# The workers of `slots: auto`, whose number only the host knows; at least the first exists.
AUTO_SLOTS, _FIRST_SLOT = "hivewright-worker@auto.service", "hivewright-worker@0.service"
# Health checks of a worker that the notes below the table cover already.
_JUDGED_HERE = ("rewards",)
# This many rewards may be on their way to the chain; more mean that something blocks them.
MAX_OPEN_REWARDS = 10
COLUMNS = (
    "node",
    "release",
    "state",
    "round",
    "reward",
    "peers",
    "device",
    "gpu memory",
    "disk",
    "tailscale",
    "on chain",
    "peer",
)
_COLOURS = {"connected": "green", "training-alone": "yellow", "catching-up": "yellow"}
LEFT_COLUMNS = ("node", "release", "state", "device", "tailscale", "peer")
# Columns that are left out first on a narrow terminal.
EXPENDABLE = ("peer", "on chain", "tailscale", "gpu memory")


def run(options: argparse.Namespace) -> None:
    """Print the table, or JSON. Raises WorkerError if a host or service needs attention."""
    pyinfra = pyinfra_process.Pyinfra.of_operator(options.inventory)
    hosts = commands.chosen_hosts(pyinfra, options.limit)
    with progress.waiting(f"asking {len(hosts)} host{'s' * (len(hosts) > 1)}"):
        found = queries.look(pyinfra, [host["name"] for host in hosts])
    show_as = _print_json if options.json else _print
    if not show_as(expected(hosts), found):
        raise WorkerError(
            "some hosts or services need attention (see above); `hivewright fleet logs` shows more"
        )


def show(
    inventory: str,
    *,
    prefix: Sequence[str] = (),
) -> bool:
    """Print the table; return whether every host answered and every service runs."""
    pyinfra = pyinfra_process.Pyinfra.of_operator(inventory, prefix)
    hosts = pyinfra.hosts(timeout=ASK_SECONDS)
    names = [host["name"] for host in hosts]
    return _print(expected(hosts), queries.look(pyinfra, names))


def expected(hosts: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the units that should run, by host; the number of `auto` slots is unknown here."""
    units: dict[str, list[str]] = {}
    for host in hosts:
        own = units.setdefault(host["name"], [])
        if COORDINATORS in host["groups"]:
            own += units_of(roles_of(host["data"]), is_worker=False)
        if WORKERS in host["groups"]:
            own += _worker_units(host["data"].get("slots"))
    return units


def _worker_units(named: object) -> list[str]:
    """Return the units of a host's slots; one if the inventory's `slots` is missing or wrong."""
    try:
        slots = parse_slots(named) or ({},)
    except ValueError:
        # Reported with the other mistakes in the inventory.
        slots = ({},)
    if isinstance(slots, str):
        return [AUTO_SLOTS]
    return [worker_unit(number) for number in range(len(slots))]


def _print(
    units: Mapping[str, Sequence[str]],
    found: queries.Looked,
) -> bool:
    console = Console()
    table, notes, is_well = status_table(
        units, found.states, found.reports, time.time(), console.width
    )
    console.print(table)
    for note in notes:
        say(console, note)
    for name, reason in found.reasons.items():
        say(console, f"{name}: {printable(reason)}")
    sys.stdout.flush()
    return is_well


def _print_json(
    units: Mapping[str, Sequence[str]],
    found: queries.Looked,
) -> bool:
    _, notes, is_well = status_table(units, found.states, found.reports, time.time(), width=0)
    said = {
        name: {
            "host": found.states.get(name),
            "services": found.reports.get(name),
            "expected": units[name],
            "notes": [note for note in notes if note.startswith((f"{name}: ", f"{name}/"))],
            "reason": found.reasons.get(name),
        }
        for name in units
    }
    print(json.dumps(said, indent=2), flush=True)
    return is_well


def status_table(
    units: Mapping[str, Sequence[str]],
    states: Mapping[str, Mapping[str, Any]],
    reports: Mapping[str, Sequence[Mapping[str, Any]]],
    now: float,
    width: int,
) -> tuple[Table, list[str], bool]:
    """Return the table, lines to print below it, and whether everything is well.

    `units`: those that should run, by host. `states`, `reports`: HostState and NodeReports by host,
    without unreachable hosts. `now`: seconds since 1970. `width`: columns of the terminal.
    """
    rows: list[Row] = []
    notes: list[str] = []
    is_well = True
    for host, expected_units in units.items():
        state = states.get(host)
        if state is None or host not in reports:
            rows.append({"node": host, "state": cell("unreachable", "red")})
            is_well = False
            continue
        worries = _host_notes(host, state)
        is_well = is_well and not worries
        notes += worries
        if state["commit"] is None and not reports[host]:
            rows.append({"node": host, "state": cell("not deployed", "red"), **_host_cells(state)})
            is_well = False
            continue
        for name, row in _rows(expected_units, reports[host], state, now):
            node = f"{host}/{name}"
            rows.append({"node": node, **_host_cells(state), **row.cells})
            is_well = is_well and row.is_well
            notes += [f"{node}: {printable(note)}" for note in row.notes]
    return _table(rows, width), notes, is_well


@dataclass(frozen=True, slots=True)
class _Row:
    """The line of one unit, and `notes` below the table."""

    cells: Row
    is_well: bool
    notes: tuple[str, ...] = ()


def _rows(
    expected_units: Sequence[str],
    reports: Sequence[Mapping[str, Any]],
    state: Mapping[str, Any],
    now: float,
) -> Iterator[tuple[str, _Row]]:
    """Yield a short name and the line of each unit of a host, the expected ones first."""
    seen = {report["unit"]: report for report in reports}
    has_auto_slots = AUTO_SLOTS in expected_units
    wanted = [_FIRST_SLOT if unit == AUTO_SLOTS else unit for unit in expected_units]
    for unit in dict.fromkeys([*wanted, *seen]):
        name = unit.removeprefix("hivewright-").removesuffix(".service").removeprefix("worker@")
        is_expected = unit in wanted or (has_auto_slots and fleet_facts.is_worker(unit))
        if unit in seen:
            yield name, _row(seen[unit], state, now, is_expected)
        else:
            missing = cell("missing", "red")
            yield name, _Row({"state": missing}, False, (f"{unit} is not there; deploy the host",))


def _row(
    report: Mapping[str, Any],
    state: Mapping[str, Any],
    now: float,
    is_expected: bool,
) -> _Row:
    cells, is_well, notes = _service_cells(report, state, now)
    status = report["status"] or {}
    error = report.get("problem") or status.get("last_error")
    last_words = report.get("last_words")
    if error:
        notes.append(str(error))
    # The last words of a service that was stopped on purpose do not matter.
    was_stopped = report["active_state"] == "inactive" and not report.get("exit_status")
    if last_words and last_words != error and not was_stopped:
        notes.append(f"before its last end it said: {last_words}")
    if report.get("result") == "oom-kill":
        notes.append(_OUT_OF_MEMORY)
    if not is_expected:
        notes.append("the inventory does not name it; the next deploy stops it")
    return _Row(cells, is_well and is_expected, tuple(notes))


_OUT_OF_MEMORY = (
    "the kernel ended it because its memory was used up; it starts again with smaller steps; if"
    " that goes on, raise slot_memory_gb, run fewer slots there, or set a smaller model_name"
)


def _table(
    rows: Sequence[Row],
    width: int,
) -> Table:
    """Return a table of the columns that have content, as many as fit."""
    widths = {}
    for column in COLUMNS:
        values = [cell(row.get(column, "")).plain for row in rows]
        if any(values):
            widths[column] = max(map(cell_len, [column, *values])) + 1
    for column in EXPENDABLE:
        if sum(widths.values()) - 1 > width:
            widths.pop(column, None)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in widths:
        justify: Literal["left", "right"] = "left" if column in LEFT_COLUMNS else "right"
        # A host's name is folded when a line gets long.
        table.add_column(column, justify=justify, no_wrap=column != "node", overflow="fold")
    for row in rows:
        add_row(table, *(row.get(column, "") for column in widths))
    return table


def _host_cells(state: Mapping[str, Any]) -> dict[str, str]:
    free = state["disk_free_mb"]
    return {
        "release": (state["commit"] or "none")[:7],
        "disk": "" if free is None else f"{free / 1000:.0f}G",
        "tailscale": state["tailscale"] or "",
    }


def _host_notes(
    host: str,
    state: Mapping[str, Any],
) -> list[str]:
    """Return the problems of a host as a whole."""
    notes = []
    if state["commit"] is not None and state["deployed"] is None:
        notes.append(
            f"{host}: its last deploy did not get to the end; deploy it again, or `hivewright fleet"
            " rollback`"
        )
    if state["disk_free_mb"] is not None and state["disk_free_mb"] < LOW_DISK_MB:
        notes.append(
            f"{host}: disk: {state['disk_free_mb']} of {state['disk_total_mb']} MB free; make room:"
            " without it no checkpoint is written, and no worker starts"
        )
    if state["tailscale"] == tailnet.NO_STATE:
        server = printable(state.get("tailscale_server") or "its URL is not known")
        notes.append(
            f"{host}: tailscale: its control server does not answer ({server}); a login would not"
            " help"
        )
    elif state["tailscale"] not in (None, tailnet.RUNNING):
        notes.append(
            f"{host}: tailscale is {state['tailscale']}; log it in again: deploy, or `tailscale up`"
            " there"
        )
    notes += [f"{host}: {printable(line)}" for line in _clock_and_key(state)]
    notes += [f"{host}: {printable(line)}" for line in state.get("ill", ())]
    if state.get("problem"):
        notes.append(f"{host}: {printable(state['problem'])}; `hivewright doctor` there says more")
    return notes


def _clock_and_key(state: Mapping[str, Any]) -> Iterator[str]:
    offset = state.get("clock_offset")
    if offset is not None and abs(offset) > CLOCK_SECONDS:
        direction = "ahead of" if offset > 0 else "behind"
        yield (
            f"clock: {abs(offset):.0f} s {direction} this machine's; let NTP set both:"
            " `timedatectl set-ntp true`"
        )
    expiry = tailscale_key.problem(state.get("key_expires_at"), time.time())
    if expiry is not None:
        yield f"tailscale: {expiry}"


def _service_cells(
    report: Mapping[str, Any],
    state: Mapping[str, Any],
    now: float,
) -> tuple[Row, bool, list[str]]:
    """Return the cells of one service, whether it is well, and notes on it."""
    if report["active_state"] != "active":
        return {"state": cell(report["active_state"], "red")}, False, []
    if report.get("problem"):
        return {"state": cell("unreadable", "red")}, False, []
    is_keeper = fleet_facts.is_keeper(report["unit"])
    if not is_keeper and not fleet_facts.is_worker(report["unit"]):
        return {"state": "running"}, True, []
    status = report["status"]
    if status is None:
        return {"state": cell("starting", "yellow")}, True, []
    return _keeper_cells(status, now) if is_keeper else _worker_cells(status, state["gpus"], now)


def _worker_cells(
    status: Mapping[str, Any],
    gpus: Sequence[Mapping[str, Any]],
    now: float,
) -> tuple[Row, bool, list[str]]:
    silent_seconds = now - status["updated_at"]
    is_silent = silent_seconds > SILENT_SECONDS
    state = str(status["state"])
    peers_known = (status.get("swarm") or {}).get("peers_known", 0)
    ledger = status["ledger"]
    cells: dict[str, str | Text] = {
        "state": cell(state, _COLOURS.get(state, "default")),
        "round": _number(status["round"]),
        "reward": "" if status["reward_mean"] is None else f"{status['reward_mean']:.2f}",
        "peers": f"{status['peers_heard']}/{peers_known}",
        "device": str(status.get("device") or ""),
        "on chain": f"{ledger.get('confirmed', 0)}/{ledger.get('earned', 0)}",
        "peer": status["animal_name"],
    }
    if is_silent:
        cells["state"] = cell(f"silent {silent_seconds / 60:.0f} min", "red")
    notes = _missing_credit(status)
    is_well = not is_silent and not notes
    for finding in status.get("warnings", ()):
        if finding["check"] not in _JUDGED_HERE:
            is_well = is_well and finding["severity"] != "severe"
            notes.append(f"{finding['check']}: {finding['text']}")
    return cells | _gpu_cells(gpus, status.get("pid")), is_well, notes


def _keeper_cells(status: Mapping[str, Any], now: float) -> tuple[Row, bool, list[str]]:
    cause = _keeper_trouble(status, now)
    cells = {
        "state": status["state"] if cause is None else cell(status["state"], "red"),
        "round": _number(status["round"]),
        "peers": f"{status['reporters']}/{status['expected']}",
    }
    if cause is None:
        return cells, True, []
    note = f"{cause}: no round ends, nobody is credited"
    if status.get("problem"):
        note += f"; its last error: {status['problem']}"
    return cells, False, [f"{note}; {_KEEPER_HELP}"]


_KEEPER_HELP = "see that the chain runs (hivewright-chain there), then restart the keeper"


def _keeper_trouble(status: Mapping[str, Any], now: float) -> str | None:
    """Return why a keeper is not well; None if it is, or if its version does not tell."""
    if status["state"] == "chain-unreachable":
        return "it has no answer from the chain"
    began_at, limit = status.get("began_at"), status.get("limit_seconds")
    if status["state"] != "round-open" or began_at is None or limit is None:
        return None
    seconds = now - began_at
    if seconds <= 2 * limit + SLACK_SECONDS:
        return None
    return f"its round is open for {seconds / 60:.0f} min, of at most {limit / 60:.0f} min"


def _missing_credit(status: Mapping[str, Any]) -> list[str]:
    """Return why a worker's rewards do not reach the chain; empty: they do, or it has no chain."""
    ledger = status["ledger"]
    settled = sum(ledger.get(name, 0) for name in ("confirmed", "rejected", "held-back"))
    num_open = ledger.get("earned", 0) - settled
    notes = []
    if num_open > MAX_OPEN_REWARDS:
        notes.append(
            f"not credited: {num_open} rewards wait for the chain, {ledger.get('confirmed', 0)} are"
            " confirmed"
        )
    elif num_open and status.get("chain") == "unreachable":
        notes.append(f"not credited: {num_open} rewards wait, the chain can't be reached")
    elif ledger.get("rejected", 0) > ledger.get("confirmed", 0):
        notes.append(
            f"not credited: the chain rejected {ledger['rejected']} rewards of"
            f" {ledger.get('earned', 0)}"
        )
    if notes and status.get("ledger_error"):
        notes[0] += f": {status['ledger_error']}"
    return [f"{note}; see that chain and account service run" for note in notes]


def _gpu_cells(
    gpus: Sequence[Mapping[str, Any]],
    pid: int | None,
) -> dict[str, str]:
    """Return number, use and memory of the GPU that the worker's process uses, if any."""
    for gpu in gpus:
        if pid in gpu["pids"]:
            used, total = gpu["memory_used"], gpu["memory_total"]
            memory = ""
            # A GPU that shares the machine's memory (GB10) has no memory figure of its own.
            if used is not None and total is not None:
                memory = f"{used / 1024:.1f}/{total / 1024:.0f} GiB"
            use = "" if gpu["use"] is None else f": {gpu['use']}%"
            return {"device": f"{gpu['index']}{use}", "gpu memory": memory}
    return {}


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
