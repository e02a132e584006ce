"""The report of a rollout: report.json, from which `--resume` continues, and a table."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from worker.errors import SettingsError
from worker.runtime import html_report
from worker.runtime.cells import add_row, cell
from worker.runtime.files import write_whole

Fate = Literal[
    "pending", "done", "unreachable", "overdue", "failed", "lost", "rolled-back", "stuck"
]
"""The state of a host in a rollout.

pending: not touched yet. done: deployed, and it trains. unreachable: no connection. overdue: not
deployed by its deadline. failed: its deploy failed because of the host. lost: deployed, but then
unreachable or unhealthy because of the host. rolled-back: restored. stuck: can't be restored.
"""
Result = Literal["running", "done", "incomplete", "rolled-back", "stuck", "interrupted"]

_MIN_WIDTH = 12
_COLOURS = {"done": "green", "pending": "dim", "rolled-back": "yellow"}


@dataclass(slots=True)
class HostReport:
    """One host of a rollout.

    `commit`: the commit that it gets. `before`: its commit before this rollout, None: a bare host.
    `seconds`: duration of deploy and gate. `digest_before`: digest of its configuration before it
    (HostState.deployed), None if its last deploy was not completed.
    """

    commit: str
    before: str | None = None
    fate: Fate = "pending"
    reason: str = ""
    batch: int | None = None
    num_changes: int = 0
    seconds: float = 0.0
    digest_before: str | None = None


@dataclass(slots=True)
class Report:
    """A rollout. Times in seconds since 1970; `reason`: why the gate refused the release."""

    inventory: str
    hosts: dict[str, HostReport]
    started_at: float = field(default_factory=time.time)
    finished_at: float | None = None
    result: Result = "running"
    reason: str = ""
    version: int = 1

    def those(self, *fates: Fate) -> list[str]:
        """Return the hosts with one of these fates, in the inventory's order."""
        return [name for name in self.hosts if self.hosts[name].fate in fates]

    def write(self, file: Path) -> None:
        """Replace the file atomically, so that a crash leaves the last state complete."""
        write_whole(file, json.dumps(asdict(self), indent=2) + "\n")


_REPORT = TypeAdapter(Report)


def read(file: Path) -> Report:
    """Read the report of an earlier rollout. Raises SettingsError."""
    try:
        return _REPORT.validate_json(file.read_bytes())
    except FileNotFoundError:
        raise SettingsError(
            f"{file}: no such file; there is no rollout to resume; start one without --resume"
        ) from None
    except OSError as error:
        raise SettingsError(
            f"{file}: can't be read: {error.strerror}; expected the report of a rollout"
        ) from None
    except ValidationError as error:
        raise SettingsError(
            f"{file}: {error.errors()[0]['msg']}; expected the report of a rollout"
        ) from None


def table(report: Report) -> Table:
    """Return a table of touched and unreachable hosts; the summary counts the others."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("host", "batch", "s", "release", "result", "reason"):
        justify: Literal["left", "right"] = "right" if column in ("batch", "s") else "left"
        # Long names of hosts are shortened too, so that result and reason stay readable.
        gives_way = column in ("host", "reason")
        shown.add_column(
            column,
            justify=justify,
            no_wrap=not gives_way,
            overflow="fold",
            min_width=_MIN_WIDTH if gives_way else None,
        )
    for name, host in report.hosts.items():
        if host.fate == "pending":
            continue
        colour = _COLOURS.get(host.fate, "red")
        add_row(
            shown,
            name,
            "" if host.batch is None else str(host.batch),
            f"{host.seconds:.0f}",
            _change(host),
            cell(host.fate, colour),
            host.reason,
        )
    return shown


def page(report: Report) -> str:
    """Return the rollout as one HTML file: its result, and the result of each host."""
    about = [
        ("result", report.result),
        ("reason", report.reason or "-"),
        ("hosts", summary(report)),
        ("inventory", report.inventory),
        ("began", _moment(report.started_at)),
        ("ended", _moment(report.finished_at)),
    ]
    columns = ("host", "result", "reason", "release", "batch", "seconds", "changes")
    rows = [
        (
            name,
            host.fate,
            host.reason,
            _change(host),
            "" if host.batch is None else str(host.batch),
            f"{host.seconds:.0f}",
            str(host.num_changes),
        )
        for name, host in report.hosts.items()
    ]
    parts = [
        html_report.Part("Rollout", tables=[html_report.Table(("figure", "value"), about)]),
        html_report.Part("Hosts", tables=[html_report.Table(columns, rows)]),
    ]
    return html_report.render("hivewright rollout", Path(report.inventory).stem, parts)


def _moment(at: float | None) -> str:
    return "-" if at is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def summary(report: Report) -> str:
    """Return the number of hosts for each fate, in one line."""
    counts = _counts(report.hosts.values())
    return ", ".join(f"{count} {fate}" for fate, count in counts.items())


def _change(host: HostReport) -> str:
    before = host.before[:7] if host.before else "none"
    if host.fate in ("rolled-back", "unreachable", "failed"):
        return before
    after = host.commit[:7]
    return after if before == after else f"{before} > {after}"


def _counts(hosts: Iterable[HostReport]) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for host in hosts:
        name = "untouched" if host.fate == "pending" else host.fate
        counts[name] = counts.get(name, 0) + 1
    return counts
