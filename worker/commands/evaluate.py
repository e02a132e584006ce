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
    if not wanted:
        wanted = [BEFORE, NOW] if checkpoint.exists(folder) else [BEFORE]
    asked: list[Asked] | None = None
    found: dict[str, Evaluation] = {}
    for name in reversed(wanted):  # what is trained now says which levels are worth asking
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
        )
    if options.json:
        print(json.dumps({name: asdict(found[name]) for name in wanted}, indent=2))
    else:
        _print(found, wanted)


def choose_tasks(environment: Environment, level: int | None) -> list[Asked]:
    """Return families and levels to evaluate.

    Each family at `level`; without one, at its curriculum's first level and at its current one.
    """
    if level is not None:
        return [(name, level) for name in environment.names]
    now = environment.levels
    return [
        (name, number)
        for name in environment.names
        for number in (sorted({0, now[name]}) if name in now else [None])
    ]


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


def _print(found: dict[str, Evaluation], names: Sequence[str]) -> None:
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
    by_name = {name: {(s.family, s.level): s for s in found[name].scores} for name in names}
    for key in by_name[names[-1]]:
        rows = [by_name[name].get(key) for name in names]
        scores = [score for score in rows if score is not None]
        if len(scores) < len(names):  # time ran out before this family was asked
            continue
        cells = [cell for score in scores for cell in _cells(score)]
        gain = [f"{scores[-1].reward - scores[0].reward:+.3f}"] if len(names) == 2 else []
        level = "-" if key[1] is None else str(key[1])
        add_row(table, key[0], level, scores[-1].tasks, *cells, *gain)
    console = Console()
    console.print(table)
    for name in names:
        what = (
            "the untouched model"
            if name == BEFORE
            else f"after {found[name].rounds_trained} rounds"
        )
        say(
            console,
            f"{name}: {what}: mean reward {found[name].reward:.3f} in {found[name].seconds:.0f} s",
        )


def _cells(score: FamilyScore) -> tuple[str, str, str]:
    half = (score.reward_high - score.reward_low) / 2
    return f"{score.reward:.3f} ±{half:.2f}", f"{score.pass_1:.2f}", f"{score.pass_k:.2f}"
