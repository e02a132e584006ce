"""`python -m deploys.fleet.status INVENTORY`: one table of what every worker and keeper of the fleet is doing."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploys.fleet import command
from worker.errors import WorkerError

ASK_SECONDS = 120.0
# A worker that has said nothing for so long is worth a look, whatever it said last.
SILENT_SECONDS = 300.0
COLUMNS = ("node", "peer", "state", "round", "reward", "heard", "on chain")
NUM_LEFT_COLUMNS = 3


def show(inventory: str, *, prefix: Sequence[str] = ()) -> bool:
    """Print the table; return whether every host answered and every service runs."""
    pyinfra = command.Pyinfra(inventory, prefix)
    (reports,) = pyinfra.facts("deploys.facts.NodeReports", timeout=ASK_SECONDS)
    hosts = [host["name"] for host in pyinfra.hosts(timeout=ASK_SECONDS)]
    table, is_well = status_table(hosts, reports, time.time())
    Console().print(table)
    return is_well


def status_table(
    hosts: Sequence[str], reports: Mapping[str, Sequence[Mapping[str, Any]]], now: float
) -> tuple[Table, bool]:
    """The table, fit for 80 columns, and whether there is nothing in it to worry about.

    `reports`: NodeReports by host, without the hosts that could not be reached. `now`: seconds since 1970.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(COLUMNS):
        justify: Literal["left", "right"] = "left" if number < NUM_LEFT_COLUMNS else "right"
        # The peer's name gives way when a line gets long.
        table.add_column(column, justify=justify, no_wrap=column != "peer")
    is_well = True
    for host in hosts:
        if host not in reports:
            table.add_row(host, "", "[red]can't be reached[/red]")
            is_well = False
        for report in reports.get(host, ()):
            row, row_is_well = _row(report, now)
            service = report["unit"].removeprefix("hivewright-").removesuffix(".service")
            table.add_row(f"{host}/{service.removeprefix('worker@')}", *row)
            is_well = is_well and row_is_well
    return table, is_well


def _row(report: Mapping[str, Any], now: float) -> tuple[list[str], bool]:
    if report["active_state"] != "active":
        return ["", f"[red]{report['active_state']}[/red]"], False
    status = report["status"]
    if status is None:
        return ["", "[yellow]starting[/yellow]"], True
    if "peer_id" not in status:
        return [
            "",
            str(status["state"]),
            _number(status["round"]),
            "",
            f"{status['reporters']}/{status['expected']}",
        ], True
    silent_seconds = now - status["updated_at"]
    is_silent = silent_seconds > SILENT_SECONDS
    state = f"[red]silent {silent_seconds / 60:.0f} min[/red]" if is_silent else _coloured(str(status["state"]))
    return [
        escape(str(status["animal_name"])),
        state,
        _number(status["round"]),
        "" if status["reward_mean"] is None else f"{status['reward_mean']:.2f}",
        str(status["peers_heard"]),
        f"{status['ledger'].get('confirmed', 0)}/{status['ledger'].get('earned', 0)}",
    ], not is_silent


def _coloured(state: str) -> str:
    colour = {"connected": "green", "training-alone": "yellow", "catching-up": "yellow"}.get(state, "default")
    return f"[{colour}]{escape(state)}[/{colour}]"


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m deploys.fleet.status INVENTORY", file=sys.stderr)
        return 2
    try:
        return 0 if show(argv[0]) else 1
    except WorkerError as error:
        print(f"fleet status: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
