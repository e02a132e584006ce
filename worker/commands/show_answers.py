"""`hivewright answers`: show answers of a node and its peers, best and worst, in a pager."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from worker.errors import WorkerError
from worker.log import printable
from worker.runtime.cells import add_row
from worker.runtime.state_dir import StateDir
from worker.settings import Settings
from worker.swarm.identity import animal_name
from worker.telemetry import answer_log
from worker.telemetry.answer_log import Answer, AnsweredGroup

OWN, PEERS = "own", "peers"
_LONGEST_SHOWN = 2000


def run(settings: Settings, options: argparse.Namespace) -> None:
    """Print the newest groups that match the options. Raises WorkerError if there are none."""
    state_dir = settings.node.state_dir
    groups = list(islice(select(state_dir, options), options.limit))
    if not groups:
        wanted = {name: getattr(options, name) for name in ("family", "peer", "round", "reward")}
        shown = [f"--{name} {_shown(value)}" for name, value in wanted.items() if value]
        matching = f" that match {', '.join(shown)}" if shown else ""
        folder = StateDir(state_dir).answers
        raise WorkerError(f"{folder}: no answers{matching}; {_advice(state_dir)}")
    if options.json:
        for group in groups:
            print(json.dumps(asdict(group)))
        return
    console = Console()
    if sys.stdout.isatty():
        with console.pager(styles=True):
            _show(console, groups, options.all)
    else:
        _show(console, groups, options.all)


def select(
    state_dir: Path,
    options: argparse.Namespace,
) -> Iterator[AnsweredGroup]:
    """Yield the groups that match the options, newest first."""
    first, last = options.round or (0, None)
    for group in answer_log.read(state_dir, first, last):
        if options.family and group.family != options.family:
            continue
        if options.reward and not options.reward[0] <= group.mean_reward <= options.reward[1]:
            continue
        if options.peer and not is_from(group, options.peer):
            continue
        yield group


def is_from(group: AnsweredGroup, peer: str) -> bool:
    """Return whether the group is from `peer`: own, peers, or a part of an id or animal name."""
    if group.peer_id is None or peer in (OWN, PEERS):
        return peer == (OWN if group.peer_id is None else PEERS)
    return peer in group.peer_id or peer.lower() in animal_name(group.peer_id)


def _show(
    console: Console,
    groups: list[AnsweredGroup],
    all_answers: bool,
) -> None:
    for group in groups:
        console.print(_picture(group, all_answers))


def _picture(group: AnsweredGroup, all_answers: bool) -> Group:
    """Render a group without markup, because questions and answers are untrusted text."""
    level = "" if group.level is None else f" level {group.level}"
    title = [
        f"round {group.round}",
        f"{group.family}{level}",
        "own" if group.peer_id is None else animal_name(group.peer_id),
        f"mean {group.mean_reward:.2f}",
        "trained" if group.trained else "not trained on",
    ]
    heading = Rule(Text(printable("  ".join(title))), align="left", style="dim")
    parts: list[RenderableType] = [heading, _text(group.question)]
    if group.right is not None:
        parts.append(Text.assemble(("right answer: ", "dim"), _text(group.right)))
    if all_answers:
        ranked = sorted(group.answers, key=lambda answer: -answer.reward)
        parts += [Text.assemble(_heading(answer), "\n", _text(answer.text)) for answer in ranked]
        return Group(*parts, "")
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
    shown = [group.best]
    if group.worst.reward != group.best.reward:
        shown.append(group.worst)
    for answer in shown:
        table.add_column(_heading(answer), ratio=1, overflow="fold")
    add_row(table, *(_text(answer.text) for answer in shown))
    return Group(*parts, table, "")


def _heading(answer: Answer) -> Text:
    figures = [f"reward {answer.reward:.2f}"]
    if answer.advantage:
        figures.append(f"advantage {answer.advantage:+.2f}")
    if answer.logprob is not None:
        figures.append(f"log-probability {answer.logprob:.2f}")
    if answer.truncated:
        figures.append("cut off")
    return Text(", ".join(figures), style="green" if answer.reward >= 0.5 else "red")


def _text(text: str) -> Text:
    """Render untrusted text: keep its lines, make other control characters visible."""
    lines = [printable(line) for line in text[:_LONGEST_SHOWN].split("\n")]
    if len(text) > _LONGEST_SHOWN:
        lines.append(f"[{len(text) - _LONGEST_SHOWN} more characters]")
    return Text("\n".join(lines))


def _shown(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return "-".join("" if part is None else str(part) for part in value)


def _advice(state_dir: Path) -> str:
    rounds, families = set(), set()
    for group in answer_log.read(state_dir):
        rounds.add(group.round)
        families.add(group.family)
    if not rounds:
        return "a node writes them after each round, unless node.answers_rounds is 0"
    names = ", ".join(sorted(families))
    return f"there are rounds {min(rounds)} to {max(rounds)}, families {names}"
