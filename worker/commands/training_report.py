"""`hivewright report`: one HTML file about a node's run, or about the nodes of a demo."""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from worker import settings as settings_module
from worker.errors import SettingsError
from worker.log import discreet, printable
from worker.runtime.files import write_whole
from worker.runtime.html_report import Chart, Part, Points, Table, Text, render
from worker.settings import Settings
from worker.telemetry import answer_log, evaluation_log, status
from worker.telemetry.answer_log import AnsweredGroup
from worker.telemetry.status import NodeStatus

MEAN_OF = 5
"""Number of rounds in the means of the beginning and of the end."""
NUM_EXAMPLES = 3
_LONGEST_TEXT = 2000
_CURVES = {
    "Share of groups without a signal": ("quality", "frac_reward_zero_std"),
    "Entropy (nats)": ("quality", "entropy"),
    "Clip ratio": ("quality", "clip_ratio"),
    "KL to the sampler (nats)": ("quality", "sampling_kl"),
    "Mean length of answers (tokens)": ("quality", "completions_mean_length"),
    "Truncated share": ("truncated",),
    "Closed share": ("closed",),
    "Gradient norm": ("grad_norm",),
    "Share of peers' groups": ("external_share",),
    "Seconds of a round": ("seconds",),
}


def run(settings: Settings, options: argparse.Namespace) -> None:
    """Write the report of the node with these settings. Raises SettingsError without a node."""
    folder = settings.node.state_dir
    node = status.read(folder)
    if node is None:
        raise SettingsError(f"{folder}: no node has run there; expected its state folder")
    write(options.output, f"hivewright: {node.name}", [folder], settings)
    print(f"report: {options.output}")


def write(
    file: Path,
    title: str,
    folders: Sequence[Path],
    settings: Settings,
) -> None:
    """Write the report of the nodes with these state folders to `file`."""
    nodes = {folder: node for folder in folders if (node := status.read(folder)) is not None}
    rounds = {node.name: status.read_rounds(folder) for folder, node in nodes.items()}
    parts = [
        Part("Nodes", tables=[_summary(nodes, rounds)]),
        Part("Curves", charts=list(_charts(rounds))),
        Part("Held-out tasks, before and after", tables=list(_evaluations(nodes))),
        Part("Examples of the last rounds", texts=list(_examples(folders))),
        Part("Settings", texts=[Text("of this run", discreet(settings_module.dump(settings)))]),
    ]
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    write_whole(file, render(title, f"written {when}", parts), durable=False)


def _summary(
    nodes: Mapping[Path, NodeStatus], rounds: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Table:
    columns = (
        "node",
        "known as",
        "model",
        "version",
        "state",
        "rounds",
        "reward",
        "device",
        "peer",
    )
    rows = []
    for node in nodes.values():
        rewards = [line["reward_mean"] for line in rounds[node.name]]
        change = f"{_mean(rewards[:MEAN_OF])} > {_mean(rewards[-MEAN_OF:])}" if rewards else ""
        row = (
            node.name,
            node.animal_name,
            node.model,
            node.version,
            node.state,
            str(node.rounds_trained),
            change,
            node.device or "",
            node.peer_id,
        )
        rows.append([printable(cell) for cell in row])
    return Table(columns, rows)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}"


def _charts(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Chart]:
    def lines(*path: str) -> dict[str, Points]:
        return {name: list(_points(found, path)) for name, found in rounds.items()}

    yield Chart("Mean reward", lines("reward_mean"))
    yield Chart("Mean reward by family", _by_family(rounds))
    for title, path in _CURVES.items():
        yield Chart(title, {name: line for name, line in lines(*path).items() if line})


def _points(
    rounds: Sequence[Mapping[str, Any]], path: Sequence[str]
) -> Iterator[tuple[float, float]]:
    for line in rounds:
        value: Any = line
        for name in path:
            value = (value or {}).get(name)
        if value is not None:
            yield line["round"], value


def _by_family(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Points]:
    """Return the mean reward of each family by round, over all nodes."""
    found: dict[str, dict[int, list[float]]] = {}
    for lines in rounds.values():
        for line in lines:
            for family in line.get("families", ()):
                of_round = found.setdefault(family["family"], {}).setdefault(line["round"], [])
                of_round.append(family["reward"])
    return {
        printable(name): [(n, sum(rewards) / len(rewards)) for n, rewards in sorted(by.items())]
        for name, by in sorted(found.items())
    }


def _evaluations(nodes: Mapping[Path, NodeStatus]) -> Iterator[Table]:
    for folder, node in nodes.items():
        done = evaluation_log.read(folder)
        rows = [[node.name, str(one.rounds_trained), f"{one.reward:.3f}"] for one in done]
        if rows:
            yield Table(("node", "rounds trained", "reward"), rows)


def _examples(folders: Sequence[Path]) -> Iterator[Text]:
    for folder in folders[:1]:
        groups = (group for group in answer_log.read(folder) if group.best.reward)
        for group in islice(groups, NUM_EXAMPLES):
            whose = "own" if group.peer_id is None else f"peer {group.peer_id}"
            title = f"round {group.round}, {group.family}, {whose}"
            yield Text(printable(title), discreet(_example(group)))


def _example(group: AnsweredGroup) -> str:
    def shown(text: str) -> str:
        return "\n".join(printable(line) for line in text[:_LONGEST_TEXT].splitlines())

    return "\n".join(
        (
            shown(group.question),
            f"\n-- best, reward {group.best.reward:.2f}:",
            shown(group.best.text),
            f"\n-- worst, reward {group.worst.reward:.2f}:",
            shown(group.worst.text),
        )
    )
