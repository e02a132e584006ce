"""`hivewright fleet watch INVENTORY`: all hosts and slots, live in the terminal.

Without a terminal it prints a line for each service whenever its state or round changes.
"""

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from deploys.fleet import commands, queries, status
from deploys.fleet.pyinfra_process import Pyinfra
from worker.log import printable
from worker.runtime.cells import add_row, say

BARS = "▁▂▃▄▅▆▇█"
TREND_ROUNDS = 32
"""Number of rounds in a sparkline."""


class Trends:
    """Mean rewards of each worker by the time its rounds ended, from all reports so far."""

    def __init__(self) -> None:
        self._rewards: defaultdict[str, dict[float, float]] = defaultdict(dict)

    def see(
        self,
        reports: Mapping[str, Sequence[Mapping[str, Any]]],
    ) -> None:
        """Add the rounds of NodeReports by host."""
        for host, found in reports.items():
            for report in found:
                known = self._rewards[f"{host}/{short_unit(report['unit'])}"]
                rounds = zip(report.get("finished", ()), report.get("rewards", ()), strict=False)
                known.update({at: reward for at, reward in rounds if reward is not None})
                for at in sorted(known)[:-TREND_ROUNDS]:
                    del known[at]

    def rows(self) -> Iterator[tuple[str, str, float]]:
        """Yield name, sparkline and last reward of each worker that finished a round."""
        for name, known in self._rewards.items():
            if known:
                rewards = [known[at] for at in sorted(known)]
                yield name, sparkline(rewards), rewards[-1]


def sparkline(rewards: Sequence[float]) -> str:
    """Return a bar for each reward, from 0 to 1."""
    highest = len(BARS) - 1
    return "".join(BARS[round(min(1.0, max(0.0, reward)) * highest)] for reward in rewards)


def short_unit(unit: str) -> str:
    return unit.removeprefix("hivewright-").removesuffix(".service")


def run(options: argparse.Namespace) -> None:
    """Look at the hosts every `--every` seconds, until Ctrl-C or `--times` looks."""
    pyinfra = Pyinfra.of_operator(options.inventory)
    hosts = commands.chosen_hosts(pyinfra, options.limit)
    names = [host["name"] for host in hosts]
    units, trends, console = status.expected(hosts), Trends(), Console()
    with _display(console, units, trends) as show:
        for number in itertools.count(1):
            found = queries.look(pyinfra, names)
            trends.see(found.reports)
            show(found)
            if number == options.times:
                break
            time.sleep(options.every)


@contextmanager
def _display(
    console: Console, units: Mapping[str, Sequence[str]], trends: Trends
) -> Iterator[Callable[[queries.Looked], None]]:
    if not console.is_terminal:
        shown: dict[str, str] = {}
        yield lambda found: _print_changes(console, found, shown)
        return
    with Live(console=console, auto_refresh=False, screen=True) as live:
        yield lambda found: live.update(screen(units, found, trends, console.width), refresh=True)


def screen(
    units: Mapping[str, Sequence[str]], found: queries.Looked, trends: Trends, width: int
) -> Group:
    """Return the fleet's table, its notes, and a sparkline of each worker's rewards."""
    now = time.time()
    table, notes, _ = status.status_table(units, found.states, found.reports, now, width)
    notes += [f"{name}: {printable(reason)}" for name, reason in found.reasons.items()]
    curves = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("worker", f"rewards of the last {TREND_ROUNDS} rounds", "last"):
        curves.add_column(column, no_wrap=True)
    for name, line, last in trends.rows():
        add_row(curves, name, line, f"{last:.2f}")
    as_of = time.strftime("%H:%M:%S", time.localtime(now))
    return Group(f"as of {as_of}, Ctrl-C ends", table, "", curves, "", *notes)


def _print_changes(
    console: Console,
    found: queries.Looked,
    shown: dict[str, str],
) -> None:
    """Print the services that differ from what was printed last."""
    lines = {name: f"no answer: {reason}" for name, reason in found.reasons.items()}
    for host, reports in found.reports.items():
        for report in reports:
            lines[f"{host}/{short_unit(report['unit'])}"] = _line(report)
    at = time.strftime("%H:%M:%S")
    for name, line in lines.items():
        if shown.get(name) != line:
            shown[name] = line
            say(console, f"{at} {name} {printable(line)}")


def _line(report: Mapping[str, Any]) -> str:
    now = report["status"] or {}
    words = [report["active_state"]]
    for name in ("state", "round", "reward_mean", "peers_heard"):
        if now.get(name) is not None:
            value = now[name]
            words.append(f"{name}={value:.3f}" if isinstance(value, float) else f"{name}={value}")
    if now.get("last_error"):
        words.append(f"error={now['last_error']}")
    return " ".join(words)
