"""`hivewright fleet status INVENTORY`: one table of all hosts, workers and keepers of the fleet."""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploys import fleet_facts, progress
from deploys.fleet import commands, pyinfra_process, queries
from deploys.inventory.host_plan import COORDINATORS, WORKERS
from deploys.inventory.schema import parse_slots
from deploys.services import COORDINATOR_UNITS, worker_unit
from deploys.tailscale import tailnet
from worker.errors import WorkerError
from worker.log import printable
from worker.runtime.cells import add_row, cell, say

Row = Mapping[str, str | Text]

ASK_SECONDS = 120.0
# A worker that has said nothing for so long is worth a look, whatever it said last.
SILENT_SECONDS = 300.0
# Less than this, in 10^6 bytes, is worth one too: a checkpoint is that big.
LOW_DISK_MB = 2000
# In the place of the workers of `slots: auto`, whose number only the host knows; there is at least
# the first.
AUTO_SLOTS, _FIRST_SLOT = "hivewright-worker@auto.service", "hivewright-worker@0.service"
# Of a worker's own warnings, those that are in the notes already.
_JUDGED_HERE = ("rewards",)
# Rewards on their way to the chain: of the rounds of some minutes. More, and something is in their
# way.
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
LEFT_COLUMNS = ("node", "release", "state", "device", "tailscale", "peer")
# What goes first where there is no room for all.
EXPENDABLE = ("peer", "on chain", "tailscale", "gpu memory")


def run(options: argparse.Namespace) -> None:
    """Print the table, or JSON. Raises WorkerError if a host or service needs attention."""
    pyinfra = pyinfra_process.Pyinfra.of_operator(options.inventory)
    hosts = commands.chosen_hosts(pyinfra, options.limit)
    with progress.waiting(f"asking {len(hosts)} host{'s' * (len(hosts) > 1)}"):
        found = queries.look(pyinfra, [host["name"] for host in hosts])
    if not (_print_json if options.json else _print)(expected(hosts), found):
        raise WorkerError(
            "some hosts or services need attention (see above); `hivewright fleet logs` shows more"
        )


def show(inventory: str, *, prefix: Sequence[str] = ()) -> bool:
    """Print the table; return whether every host answered and every service runs."""
    pyinfra = pyinfra_process.Pyinfra.of_operator(inventory, prefix)
    hosts = pyinfra.hosts(timeout=ASK_SECONDS)
    return _print(expected(hosts), queries.look(pyinfra, [host["name"] for host in hosts]))


def expected(hosts: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the units that should run, by host; the number of `auto` slots is unknown here."""
    return {host["name"]: [*_of_coordinator(host), *_of_worker(host)] for host in hosts}


def _of_coordinator(host: Mapping[str, Any]) -> list[str]:
    return list(COORDINATOR_UNITS) if COORDINATORS in host["groups"] else []


def _of_worker(host: Mapping[str, Any]) -> list[str]:
    if WORKERS not in host["groups"]:
        return []
    try:
        slots = parse_slots(host["data"].get("slots"))
    except ValueError:
        # What is wrong with it has been reported; a worker is expected in any case.
        slots = ({},)
    if isinstance(slots, str):
        return [AUTO_SLOTS]
    return [worker_unit(number) for number in range(len(slots or ({},)))]


def _print(units: Mapping[str, Sequence[str]], found: queries.Looked) -> bool:
    console = Console()
    table, notes, is_well = status_table(
        units, found.states, found.reports, time.time(), console.width
    )
    console.print(table)
    for note in [
        *notes,
        *(f"{name}: {printable(reason)}" for name, reason in found.reasons.items()),
    ]:
        say(console, note)
    sys.stdout.flush()
    return is_well


def _print_json(units: Mapping[str, Sequence[str]], found: queries.Looked) -> bool:
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
        seen = {report["unit"]: report for report in reports[host]}
        wanted = [_FIRST_SLOT if unit == AUTO_SLOTS else unit for unit in expected_units]
        for unit in [*wanted, *(unit for unit in seen if unit not in wanted)]:
            row = _row(seen.get(unit), unit, state, now, _is_expected(unit, expected_units))
            node = f"{host}/{_short(unit)}"
            rows.append({"node": node, **_host_cells(state), **row.cells})
            is_well = is_well and row.is_well
            notes += [f"{node}: {printable(said)}" for said in row.notes]
    return _table(rows, width), notes, is_well


def _is_expected(unit: str, expected_units: Sequence[str]) -> bool:
    """Return whether the inventory names a unit, or may mean it by `slots: auto`."""
    return unit in expected_units or (fleet_facts.is_worker(unit) and AUTO_SLOTS in expected_units)


def _short(unit: str) -> str:
    return unit.removeprefix("hivewright-").removesuffix(".service").removeprefix("worker@")


@dataclass(frozen=True, slots=True)
class _Row:
    """The line of one unit, and `notes` below the table."""

    cells: Row
    is_well: bool
    notes: tuple[str, ...] = ()


def _row(
    report: Mapping[str, Any] | None,
    unit: str,
    state: Mapping[str, Any],
    now: float,
    is_expected: bool,
) -> _Row:
    if report is None:
        return _Row(
            {"state": cell("missing", "red")}, False, (f"{unit} is not there; deploy the host",)
        )
    cells, is_well, notes = _service_cells(report, state, now)
    status = report["status"] or {}
    error = report.get("problem") or status.get("last_error")
    said = report.get("last_words")
    notes += [str(error)] if error else []
    # Who was stopped on purpose had nothing to say.
    if (
        said
        and said != error
        and (report["active_state"] != "inactive" or report.get("exit_status"))
    ):
        notes.append(f"before its last end it said: {said}")
    if not is_expected:
        notes.append("the inventory does not name it; the next deploy stops it")
    return _Row(cells, is_well and is_expected, tuple(notes))


def _table(rows: Sequence[Row], width: int) -> Table:
    """Return a table of the columns that have content, as many as fit."""
    columns = [column for column in COLUMNS if any(row.get(column) for row in rows)]
    for column in EXPENDABLE:
        if _width(rows, columns) > width and column in columns:
            columns.remove(column)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        justify: Literal["left", "right"] = "left" if column in LEFT_COLUMNS else "right"
        # A host's name gives way when a line gets long.
        table.add_column(column, justify=justify, no_wrap=column != "node", overflow="fold")
    for row in rows:
        add_row(table, *(row.get(column, "") for column in columns))
    return table


def _width(rows: Sequence[Row], columns: Sequence[str]) -> int:
    cells = ((column, *(cell(row.get(column, "")).plain for row in rows)) for column in columns)
    return sum(max(map(cell_len, column)) + 1 for column in cells) - 1


def _host_cells(state: Mapping[str, Any]) -> dict[str, str]:
    free = state["disk_free_mb"]
    return {
        "release": (state["commit"] or "none")[:7],
        "disk": "" if free is None else f"{free / 1000:.0f}G",
        "tailscale": state["tailscale"] or "",
    }


def _host_notes(host: str, state: Mapping[str, Any]) -> list[str]:
    """Return the problems of a host as a whole."""
    notes = []
    if state["commit"] is not None and state["deployed"] is None:
        notes.append(
            f"{host}: its last deploy did not get to the end; deploy it again, or `hivewright fleet"
            " rollback`"
        )
    if state["disk_free_mb"] is not None and state["disk_free_mb"] < LOW_DISK_MB:
        notes.append(f"{host}: disk: {state['disk_free_mb']} of {state['disk_total_mb']} MB free")
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
    if state.get("problem"):
        notes.append(f"{host}: {printable(state['problem'])}; `hivewright doctor` there says more")
    return notes


def _service_cells(
    report: Mapping[str, Any], state: Mapping[str, Any], now: float
) -> tuple[Row, bool, list[str]]:
    """Return the cells of one service, whether it is well, and notes on it."""
    if report["active_state"] != "active":
        return {"state": cell(f"{report['active_state']}", "red")}, False, []
    status = report["status"]
    if report.get("problem"):
        return {"state": cell("unreadable", "red")}, False, []
    if not (fleet_facts.is_keeper(report["unit"]) or fleet_facts.is_worker(report["unit"])):
        return {"state": "running"}, True, []
    if status is None:
        return {"state": cell("starting", "yellow")}, True, []
    if fleet_facts.is_keeper(report["unit"]):
        return _keeper_cells(status)
    silent_seconds = now - status["updated_at"]
    is_silent = silent_seconds > SILENT_SECONDS
    shown = (
        cell(f"silent {silent_seconds / 60:.0f} min", "red")
        if is_silent
        else _coloured(str(status["state"]))
    )
    cells = {
        "state": shown,
        "round": _number(status["round"]),
        "reward": "" if status["reward_mean"] is None else f"{status['reward_mean']:.2f}",
        "peers": f"{status['peers_heard']}/{(status.get('swarm') or {}).get('peers_known', 0)}",
        "device": str(status.get("device") or ""),
        "on chain": f"{status['ledger'].get('confirmed', 0)}/{status['ledger'].get('earned', 0)}",
        "peer": status["animal_name"],
    }
    credit = _missing_credit(status)
    findings = [found for found in status.get("warnings", ()) if found["check"] not in _JUDGED_HERE]
    is_well = (
        not is_silent
        and not credit
        and not any(found["severity"] == "severe" for found in findings)
    )
    notes = [*credit, *(f"{found['check']}: {found['text']}" for found in findings)]
    return cells | _gpu_cells(state["gpus"], status.get("pid")), is_well, notes


def _keeper_cells(status: Mapping[str, Any]) -> tuple[Row, bool, list[str]]:
    heard = f"{status['reporters']}/{status['expected']}"
    is_well = status["state"] != "chain-unreachable"
    said = status["state"]
    cells = {
        "state": said if is_well else cell(f"{said}", "red"),
        "round": _number(status["round"]),
        "peers": heard,
    }
    return (
        cells,
        is_well,
        [] if is_well else ["it has no answer from the chain: no round ends, nobody is credited"],
    )


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
    return notes


def _gpu_cells(gpus: Sequence[Mapping[str, Any]], pid: int | None) -> dict[str, str]:
    """Return number, use and memory of the GPU that the worker's process uses, if any."""
    for gpu in gpus:
        if pid in gpu["pids"]:
            used, total = gpu["memory_used"], gpu["memory_total"]
            # Who shares the machine's memory (GB10) has no figure of its own.
            memory = (
                "" if used is None or total is None else f"{used / 1024:.1f}/{total / 1024:.0f} GiB"
            )
            use = "" if gpu["use"] is None else f": {gpu['use']}%"
            return {"device": f"{gpu['index']}{use}", "gpu memory": memory}
    return {}


def _coloured(state: str) -> Text:
    colour = {"connected": "green", "training-alone": "yellow", "catching-up": "yellow"}.get(
        state, "default"
    )
    return cell(state, colour)


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
