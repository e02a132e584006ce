"""`hivewright fleet status INVENTORY`: one table of what every host, worker and keeper of the fleet is doing."""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deploys import survey
from deploys.fleet import command, look, upkeep
from worker.errors import WorkerError
from worker.log import printable

ASK_SECONDS = 120.0
# A worker that has said nothing for so long is worth a look, whatever it said last.
SILENT_SECONDS = 300.0
# Less than this, in 10^6 bytes, is worth one too: a checkpoint is that big.
LOW_DISK_MB = 2000
COLUMNS = (
    "node", "release", "state", "round", "reward", "peers", "gpu", "gpu memory", "disk", "tailscale", "on chain",
    "peer",
)  # fmt: skip
LEFT_COLUMNS = ("node", "release", "state", "tailscale", "peer")
# What goes first where there is no room for all.
EXPENDABLE = ("peer", "on chain", "tailscale", "gpu memory")


def run(options: argparse.Namespace) -> None:
    """Print the table, or with --json all that it is made of. Raises WorkerError if a host or service needs a look."""
    pyinfra = command.Pyinfra.of_operator(options.inventory)
    names = upkeep.chosen(pyinfra, options.limit)
    found = look.look(pyinfra, names)
    if not (_print_json if options.json else _print)(names, found):
        raise WorkerError("not all is well; what stands above says where, `hivewright fleet logs` says more")


def show(inventory: str, *, prefix: Sequence[str] = ()) -> bool:
    """Print the table; return whether every host answered and every service runs."""
    pyinfra = command.Pyinfra.of_operator(inventory, prefix)
    names = [host["name"] for host in pyinfra.hosts(timeout=ASK_SECONDS)]
    return _print(names, look.look(pyinfra, names))


def _print(names: Sequence[str], found: look.Looked) -> bool:
    console = Console()
    table, notes, is_well = status_table(names, found.states, found.reports, time.time(), console.width)
    console.print(table)
    for note in [*notes, *(f"{name}: {printable(reason)}" for name, reason in found.reasons.items())]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    sys.stdout.flush()
    return is_well


def _print_json(names: Sequence[str], found: look.Looked) -> bool:
    said = {
        name: {
            "host": found.states.get(name),
            "services": found.reports.get(name),
            "reason": found.reasons.get(name),
        }
        for name in names
    }
    print(json.dumps(said, indent=2), flush=True)
    return status_table(names, found.states, found.reports, time.time(), width=0)[2]


def status_table(
    hosts: Sequence[str],
    states: Mapping[str, Mapping[str, Any]],
    reports: Mapping[str, Sequence[Mapping[str, Any]]],
    now: float,
    width: int,
) -> tuple[Table, list[str], bool]:
    """The table, as wide as there is room, lines to go below it, and whether there is nothing to worry about.

    `states`, `reports`: HostState and NodeReports by host, without the hosts that could not be reached. `now`: seconds
    since 1970.
    """
    rows: list[dict[str, str]] = []
    notes: list[str] = []
    is_well = True
    for host in hosts:
        state = states.get(host)
        if state is None or host not in reports:
            rows.append({"node": escape(host), "state": "[red]unreachable[/red]"})
            is_well = False
            continue
        notes += _host_notes(host, state)
        shared = _host_cells(state)
        if not reports[host]:
            what = "not deployed" if state["commit"] is None else "no worker"
            rows.append({"node": escape(host), "state": f"[red]{what}[/red]", **shared})
            is_well = False
        for report in reports[host]:
            service = report["unit"].removeprefix("hivewright-").removesuffix(".service").removeprefix("worker@")
            cells, row_is_well = _service_cells(report, state, now)
            rows.append({"node": escape(f"{host}/{service}"), **shared, **cells})
            is_well = is_well and row_is_well
            error = report.get("problem") or (report["status"] or {}).get("last_error")
            notes += [f"{host}/{service}: {printable(str(error))}"] if error else []
        is_well = is_well and not state.get("problem")
    return _table(rows, width), notes, is_well and not any(": disk" in note for note in notes)


def _table(rows: Sequence[Mapping[str, str]], width: int) -> Table:
    """The columns that say something, as many as there is room for."""
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
        table.add_row(*(row.get(column, "") for column in columns))
    return table


def _width(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> int:
    cells = ((column, *(Text.from_markup(row.get(column, "")).plain for row in rows)) for column in columns)
    return sum(max(map(cell_len, column)) + 1 for column in cells) - 1


def _host_cells(state: Mapping[str, Any]) -> dict[str, str]:
    free = state["disk_free_mb"]
    return {
        "release": (state["commit"] or "none")[:7],
        "disk": "" if free is None else f"{free / 1000:.0f}G",
        "tailscale": escape(state["tailscale"] or ""),
    }


def _host_notes(host: str, state: Mapping[str, Any]) -> list[str]:
    notes = []
    if state["commit"] is not None and state["deployed"] is None:
        notes.append(f"{host}: its last deploy did not get to the end; deploy it again, or `hivewright fleet rollback`")
    if state["disk_free_mb"] is not None and state["disk_free_mb"] < LOW_DISK_MB:
        notes.append(f"{host}: disk: {state['disk_free_mb']} of {state['disk_total_mb']} MB free")
    if state["tailscale"] not in (None, "Running"):
        notes.append(f"{host}: tailscale is {state['tailscale']}; log it in again: deploy, or `tailscale up` there")
    if state.get("problem"):
        notes.append(f"{host}: {printable(state['problem'])}; `hivewright doctor` there says more")
    return notes


def _service_cells(report: Mapping[str, Any], state: Mapping[str, Any], now: float) -> tuple[dict[str, str], bool]:
    """What is shown of one service, and whether it is well."""
    if report["active_state"] != "active":
        return {"state": f"[red]{escape(report['active_state'])}[/red]"}, False
    status = report["status"]
    if report.get("problem"):
        return {"state": "[red]unreadable[/red]"}, False
    if status is None:
        return {"state": "[yellow]starting[/yellow]"}, True
    if survey.is_keeper(report["unit"]):
        heard = f"{status['reporters']}/{status['expected']}"
        said = escape(printable(status["state"]))
        return {"state": said, "round": _number(status["round"]), "peers": heard}, True
    silent_seconds = now - status["updated_at"]
    is_silent = silent_seconds > SILENT_SECONDS
    shown = f"[red]silent {silent_seconds / 60:.0f} min[/red]" if is_silent else _coloured(str(status["state"]))
    cells = {
        "state": shown,
        "round": _number(status["round"]),
        "reward": "" if status["reward_mean"] is None else f"{status['reward_mean']:.2f}",
        "peers": f"{status['peers_heard']}/{(status.get('swarm') or {}).get('peers_known', 0)}",
        "on chain": f"{status['ledger'].get('confirmed', 0)}/{status['ledger'].get('earned', 0)}",
        "peer": escape(printable(status["animal_name"])),
    }
    return cells | _gpu_cells(state["gpus"], status.get("pid")), not is_silent


def _gpu_cells(gpus: Sequence[Mapping[str, Any]], pid: int | None) -> dict[str, str]:
    """The GPU on which the worker's own process computes; nothing where there is none, or it is between two steps."""
    for gpu in gpus:
        if pid in gpu["pids"]:
            memory = f"{gpu['memory_used'] / 1024:.1f}/{gpu['memory_total'] / 1024:.0f} GiB"
            return {"gpu": f"{gpu['index']}: {gpu['use']}%", "gpu memory": memory}
    return {}


def _coloured(state: str) -> str:
    colour = {"connected": "green", "training-alone": "yellow", "catching-up": "yellow"}.get(state, "default")
    return f"[{colour}]{escape(printable(state))}[/{colour}]"


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
