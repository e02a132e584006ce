"""`hivewright eval`: held-out rewards of the untouched model and of the newest checkpoint."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from worker import environments, evaluation, model_setup
from worker.environments import Environment
from worker.errors import TrainingError
from worker.evaluation import Asked
from worker.policy.choices import ChoiceScorer
from worker.policy.policy import Policy
from worker.runtime.cells import add_row, say
from worker.runtime.state_dir import StateDir
from worker.settings import Settings
from worker.telemetry.evaluation_log import Evaluation, FamilyScore
from worker.trainer import checkpoint
from worker.trainer.checkpoint import State

BEFORE, NOW = "before", "now"


def run(settings: Settings, options: argparse.Namespace) -> None:
    """Evaluate the untouched model, the newest checkpoint, or both next to each other.

    Raises TrainingError if there is no checkpoint to evaluate, ModelError as `policies.load` does.
    """
    environment = environments.load(settings.environment)
    named: Path | None = options.checkpoint
    folder = StateDir(settings.node.state_dir).checkpoints if named is None else named
    wanted = [name for name in (BEFORE, NOW) if getattr(options, name)]
    if not wanted and checkpoint.exists(folder):
        wanted = [BEFORE, NOW]
    elif not wanted:
        wanted = [BEFORE]
    asked: list[Asked] | None = None
    found: dict[str, Evaluation] = {}
    for name in reversed(wanted):  # the trained state determines the levels to ask
        policy, state = _load(settings, folder if name == NOW else None, environment)
        environment.resume(state.get("environment", {}))
        asked = asked or choose_tasks(environment, options.level)
        found[name] = evaluation.measure(
            policy,
            environment,
            settings.generation,
            asked,
            options.tasks,
            seed=options.seed,
            seconds=options.seconds,
            round=state.get("round"),
            rounds_trained=state.get("rounds_trained", 0),
            opinion=ChoiceScorer(
                policy, settings.generation, lambda: settings.trainer.max_tokens_per_micro_batch
            ),
        )
    if options.json:
        records = {name: asdict(found[name]) for name in wanted}
        print(json.dumps(records, indent=2))
    else:
        _print(found, wanted)


def choose_tasks(
    environment: Environment,
    level: int | None,
) -> list[Asked]:
    """Return families and levels to evaluate.

    Each family at `level`; without one, at its curriculum's first level and at its current one.
    """
    if level is not None:
        return [(name, level) for name in environment.names]
    now = environment.levels
    asked: list[Asked] = []
    for name in environment.names:
        if name in now:
            asked += [(name, number) for number in sorted({0, now[name]})]
        else:
            asked.append((name, None))
    return asked


def _load(
    settings: Settings, checkpoints: Path | None, environment: Environment
) -> tuple[Policy, State]:
    """Return policy and state of the untouched model, or of the newest of `checkpoints`.

    The prompt form is the node's own.
    """
    if checkpoints is None:
        policy, state = model_setup.load_policy(settings), None
    else:
        policy, state = model_setup.load_trained(settings, checkpoints)
        if state is None:
            raise TrainingError(
                f"{checkpoints}: no checkpoint; train first, or evaluate the model with --before"
            )
    model_setup.settle_form(policy, environment, settings.generation, settings.node.state_dir)
    return policy, state or {}


def _print(
    found: dict[str, Evaluation],
    names: Sequence[str],
) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("family")
    table.add_column("level", justify="right")
    table.add_column("tasks", justify="right")
    for name in names:
        table.add_column(f"reward {name}", justify="right")
        table.add_column("pass@1", justify="right")
        table.add_column(f"pass@{found[name].scores[0].k}", justify="right")
    if len(names) == 2:
        table.add_column("gain", justify="right")
    by_key: dict[Asked, list[FamilyScore]] = {}
    for name in names:
        for score in found[name].scores:
            by_key.setdefault((score.family, score.level), []).append(score)
    for (family, level), scores in by_key.items():
        if len(scores) == len(names):  # else the time was up before this family was asked
            shown_level = "-" if level is None else str(level)
            add_row(table, family, shown_level, scores[-1].tasks, *_cells(scores))
    console = Console()
    console.print(table)
    _print_calibration(console, by_key, names)
    for name in names:
        one = found[name]
        what = "the untouched model"
        if name != BEFORE:
            what = f"after {one.rounds_trained} rounds"
        say(console, f"{name}: {what}: mean reward {one.reward:.3f} in {one.seconds:.0f} s")


def _print_calibration(
    console: Console, by_key: dict[Asked, list[FamilyScore]], names: Sequence[str]
) -> None:
    """Print the Brier scores of the families that have any."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("calibration")
    table.add_column("level", justify="right")
    for name in names:
        table.add_column(f"Brier {name}", justify="right")
    for (family, level), scores in by_key.items():
        briers = [score.brier for score in scores]
        if len(scores) == len(names) and any(brier is not None for brier in briers):
            shown = ["-" if brier is None else f"{brier:.3f}" for brier in briers]
            add_row(table, family, "-" if level is None else str(level), *shown)
    if table.row_count:
        console.print()
        console.print(table)
        say(console, "Brier score of right and wrong answers: 0 best, 2 worst")
        console.print()


def _cells(scores: Sequence[FamilyScore]) -> list[str]:
    """Return reward, pass@1 and pass@k of each score, and the gain if there are two."""
    cells = []
    for score in scores:
        half = (score.reward_high - score.reward_low) / 2
        cells.append(f"{score.reward:.3f} ±{half:.2f}")
        cells += [f"{score.pass_1:.2f}", f"{score.pass_k:.2f}"]
    if len(scores) == 2:
        first, last = scores
        cells.append(f"{last.reward - first.reward:+.3f}")
    return cells
