"""Reports for a terminal of 80 columns: a node's status, ledger and resolved settings."""

import argparse
import csv
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, get_args

import yaml
from rich.console import Console
from rich.table import Table

from worker import environments
from worker.errors import WorkerError
from worker.log import printable
from worker.records import BetState
from worker.runtime.cells import add_row, say
from worker.runtime.state_dir import StateDir
from worker.settings import Settings
from worker.swarm.identity import animal_name
from worker.swarm.protocol import messages
from worker.swarm.status import SwarmStatus
from worker.telemetry import health, status
from worker.telemetry.status import NodeStatus

if TYPE_CHECKING:
    from worker.chain.ledger import Row


def print_status(settings: Settings, options: argparse.Namespace) -> None:
    """Print the status of the node of these settings, from its status.json."""
    folder = settings.node.state_dir
    node = status.read(folder)
    if node is None:
        raise WorkerError(
            f"{folder}: no status.json; this node has not started yet; look at its log"
        )
    if options.json:
        print(json.dumps(dataclasses.asdict(node), indent=2))
        return
    if options.metrics:
        from worker.telemetry import metrics  # prometheus_client takes a while to import

        print(metrics.render(node), end="")
        return
    console = Console()
    console.print(swarm_table([node]))
    if node.state == "died":
        say(
            console,
            f"process {node.pid} ended without a message; see the end of its log, or of journalctl",
        )
    elif node.last_error is not None:
        say(console, node.last_error)
    for line in _figures(node):
        print(line)
    if node.swarm is not None:
        _print_swarm(node.swarm)
    _print_health(console, node)


def _figures(node: NodeStatus) -> Iterator[str]:
    """Yield lines about rewards, pushes, time and evaluations; unknown figures are left out."""
    if node.ledger_error is not None:
        yield f"rewards wait in the ledger: {printable(node.ledger_error)}"
    hub, waiting, seconds = node.hub, node.waiting_seconds, node.round_seconds
    if hub is not None:
        pushed = "nothing yet" if hub.pushed_round is None else f"round {hub.pushed_round}"
        line = f"hub {hub.repo}: {pushed} pushed, now {hub.state}"
        if hub.error:
            line += f", failed {hub.failures} times: {printable(hub.error)}"
        yield line
    if waiting is not None and seconds is not None:
        yield f"last round {seconds:.0f} s, of which waiting for peers {waiting:.0f} s"
    if node.extra_steps:
        yield (
            f"while rounds were open: {node.extra_steps} more steps, with"
            f" {node.extra_groups} more groups of its own"
        )
    if node.groups_behind:
        ages = ", ".join(f"{n}: {count}" for n, count in sorted(node.groups_behind.items()))
        yield f"groups of peers by the number of rounds that they were behind: {ages}"
    if seconds_by := node.condition.recent.seconds_by:
        spent = ", ".join(f"{name} {value:.1f}" for name, value in seconds_by.items())
        yield f"seconds a round: {spent}"
    yield from _of_market(node)
    now, before = node.held_out_now, node.held_out_before
    if now is not None and before is not None:
        yield f"held-out reward {now:.3f}, before training {before:.3f}"


def _of_market(node: NodeStatus) -> Iterator[str]:
    """Yield lines about bets in the prediction market, and the model's calibration."""
    bets = {state: node.market[state] for state in get_args(BetState) if state in node.market}
    if bets:
        counts = ", ".join(f"{count:.0f} {state}" for state, count in bets.items())
        yield f"bets in the prediction market: {counts}"
    if "brier" in node.market:
        yield (
            f"Brier score of {node.market['rated']:.0f} answers (0 best, 2 worst):"
            f" {node.market['brier']:.3f}"
        )
        for family, score in sorted(node.market_brier.items()):
            yield f"  {printable(family)} {score:.3f}"


def _print_health(console: Console, node: NodeStatus) -> None:
    """Print a line for each check, and below it the problem and what to do."""
    found = {finding.check: finding for finding in node.warnings}
    for check in health.CHECKS:
        say(console, f"{check.name:<13} {check.show(node)}")
        if finding := found.get(check.name):
            say(console, f"  {finding.severity}: {finding.text}")


def _print_swarm(swarm: SwarmStatus) -> None:
    """Print statistics of the exchange with peers since the node started."""
    newest = "no group of theirs yet"
    if swarm.newest_group_at is not None:
        age = max(0.0, time.time() - swarm.newest_group_at)
        newest = f"newest group of theirs {age:.0f} s old"
    print(f"peers {swarm.peers_known} known, {len(swarm.peers_heard)} heard; {newest}")
    print(
        f"groups {swarm.groups_offered} given, {swarm.groups_fetched} fetched,"
        f" {swarm.groups_verified} verified; {swarm.bytes_in / 1e3:.0f} kB in,"
        f" {swarm.bytes_out / 1e3:.0f} kB out"
    )
    refused = (
        ("refused to others", swarm.requests_refused),
        ("refused by others", swarm.refused_by_peers),
    )
    for title, counts in (("rejected", swarm.rejected), *refused):
        if counts:
            reasons = [f"{printable(why)} {count}" for why, count in sorted(counts.items())]
            print(f"{title}: {', '.join(reasons)}")
    for theirs, count in sorted(swarm.other_versions.items()):
        package, _, _ = theirs.partition(" ")
        ours = ", ".join(each for each in swarm.versions if each.split(" ")[0] == package)
        print(
            f"{count} peers run {printable(theirs)}, this node {ours}: "
            "they can't learn from each other; upgrade the older"
        )


def swarm_table(nodes: Sequence[NodeStatus]) -> Table:
    """Return a table with the last round of each worker, 80 columns wide."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("worker", no_wrap=True, max_width=12)
    for column in ("round", "reward", "loss", "heard", "groups", "rej", "tok/s", "s", "chain"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for node in nodes:
        add_row(
            table,
            node.name,
            _shown(node.round, "d"),
            _shown(node.reward_mean, ".2f"),
            _shown(node.loss, ".3f"),
            str(node.peers_heard),
            f"{node.groups_local}+{node.groups_external}",
            str(sum(node.swarm.rejected.values()) if node.swarm else 0),
            _shown(node.tokens_per_second, ".0f"),
            _shown(node.round_seconds, ".1f"),
            _chain(node),
            node.state.removeprefix("training-"),
        )
    return table


def print_ledger(settings: Settings, options: argparse.Namespace) -> None:
    """Print every round with a reward, and its state; JSON and CSV have all fields."""
    from worker.chain.ledger import Ledger, Row

    file = StateDir(settings.node.state_dir).ledger
    if not file.exists():
        raise WorkerError(f"{file}: no ledger; this node has not earned anything yet")
    ledger = Ledger(file)
    rows = ledger.rows()
    ledger.close()
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    elif options.csv:
        writer = csv.DictWriter(sys.stdout, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow(dataclasses.asdict(row) | {"winners": " ".join(row.winners)})
    else:
        Console().print(_ledger_table(rows))


_OTHER_ROLES = {"anvil", "bootnode", "keeper", "account", "dashboard", "judge"}
"""Sections of the roles that have no model."""
_OF_A_WORKER = {"node", "model", "generation", "trainer"}


def print_settings(settings: Settings, options: argparse.Namespace) -> None:
    """Print the resolved settings, including defaults, and as comments the models that fit.

    A file for other roles alone has no such comments, and its task families are looked at only if
    it names some: a deploy checks a file for each service, and torch takes seconds to import.
    Raises SettingsError for unknown families, ModelError for a missing GPU or model folder, or a
    model with a smaller context than the settings need.
    """
    if options.model is not None:
        from worker.policy import engine_forecast

        model = settings.model.model_copy(update={"name": options.model})
        print("\n".join(engine_forecast.read(model).lines()))
        return
    named = settings.model_fields_set
    is_for_a_worker = named & _OF_A_WORKER or not named & _OTHER_ROLES
    if is_for_a_worker or "environment" in named:
        environments.load(settings.environment)
    resolved = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    if not is_for_a_worker:
        print(resolved, end="")
        return
    from worker.policy import model_sizing

    model_sizing.require_context(settings.model, settings.generation)
    print(resolved, end="")
    print(f"# {_explain_exchange(settings)}")
    for line in model_sizing.explain(settings.model, settings.trainer, settings.node.state_dir):
        print(f"# {line}")


_BYTES_PER_TOKEN = 4
"""Average number of bytes per token of English text in current vocabularies."""


def _explain_exchange(settings: Settings) -> str:
    """Return a line about how many of a round's groups fit into one message to peers."""
    num_tasks, size = settings.environment.tasks_per_round, settings.generation.num_generations
    group_bytes = size * (settings.generation.max_completion_length * _BYTES_PER_TOKEN + 64) + 256
    num_shared = min(
        num_tasks, settings.swarm.max_groups_per_peer, messages.MAX_SERVED_BYTES // group_bytes
    )
    room = f"{num_tasks * group_bytes / 1e3:.0f} of {messages.MAX_SERVED_BYTES / 1e3:.0f} kB"
    if num_shared == num_tasks:
        return f"exchange: {num_tasks} groups of {size} answers a round, at their longest {room}"
    return (
        f"exchange: only {num_shared} of {num_tasks} groups a round are shared and earn, at their"
        f" longest {room}; lower environment.tasks_per_round, generation.num_generations or"
        " generation.max_completion_length"
    )


def _ledger_table(rows: "Sequence[Row]") -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("round", "reward", "state", "block", "vote for", "state", "reason"):
        is_number = column in ("round", "reward", "block")
        table.add_column(column, justify="right" if is_number else "left")
    for row in rows:
        add_row(
            table,
            row.round,
            f"{row.reward / 1000:.3f}",
            row.reward_state,
            str(row.reward_block or ""),
            ", ".join(animal_name(peer) for peer in row.winners),
            row.vote_state or "",
            row.reward_reason or row.vote_reason or "",
        )
    return table


def _chain(node: NodeStatus) -> str:
    """Return confirmed and earned rewards, or why there are none (`down`: no answer)."""
    if node.chain == "unreachable":
        return "down"
    if node.chain != "ok" or not node.ledger:
        return node.chain
    return f"{node.ledger['confirmed']}/{node.ledger['earned']}"


def _shown(
    value: float | int | None,
    form: str,
) -> str:
    return "-" if value is None else format(value, form)
