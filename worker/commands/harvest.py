"""The parts of `hivewright fleet harvest` that run on the hosts, and `hivewright export`.

Both parts use tar archives on their standard streams. `harvest offer` writes the newest
checkpoint's weights with their rewards on held-out tasks; `harvest choose` reads the weights of
several nodes, the best first, and writes the best or their average, whichever earns more, as a
model folder.
"""

import argparse
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from worker import environments, evaluation, model_folder, model_setup, trial
from worker.environments import Environment
from worker.errors import ModelError, SettingsError, TrainingError, WorkerError
from worker.evaluation import Asked
from worker.policy.policy import Policy
from worker.runtime.archives import unpack
from worker.runtime.state_dir import StateDir
from worker.settings import Settings
from worker.telemetry import status
from worker.telemetry.model_card import model_card
from worker.trainer import checkpoint, weight_sets
from worker.trainer.checkpoint import State
from worker.trainer.trainer import Trainer

OFFER, WEIGHTS, MODEL = "offer.json", "weights", "model"
RESULT = "result.json"
_WORK = ".harvest-"


@dataclass
class _Loaded:
    """A node's model with the weights of its newest checkpoint."""

    settings: Settings
    environment: Environment
    policy: Policy
    trainer: Trainer
    state: State


def export(settings: Settings, options: argparse.Namespace) -> None:
    """Write the newest checkpoint of a node as a folder that transformers loads.

    Raises SettingsError if the folder exists, TrainingError without a checkpoint.
    """
    model_folder.require_new(options.output)
    loaded = _load(settings, options.checkpoint)
    card = _card(loaded)
    model_folder.make(
        options.output, lambda folder: model_folder.write(loaded.policy, card, folder)
    )
    print(f"{options.output}: the model after {loaded.state.get('rounds_trained', 0)} rounds")


def offer(settings: Settings, options: argparse.Namespace) -> None:
    """Evaluate the newest checkpoint; write rewards and weights as a tar to standard output."""
    loaded = _load(settings, None)
    asked = trial.choose_tasks(loaded.environment, dict(options.level))
    scores = _evaluate(loaded, asked, options)
    said = {
        **_tasks(loaded, asked, options),
        "rewards": _rows(scores),
        "round": loaded.state.get("round"),
        "rounds_trained": loaded.state.get("rounds_trained", 0),
        "origin": loaded.trainer.origin,
        "peer": _status(loaded).animal_name,
    }
    with _work_folder(settings) as name:
        folder = Path(name)
        (folder / OFFER).write_text(json.dumps(said))
        (folder / WEIGHTS).mkdir()
        checkpoint.save_weights(folder / WEIGHTS, loaded.trainer, loaded.state)
        _send(folder)


def choose(settings: Settings, options: argparse.Namespace) -> None:
    """Read several nodes' weights, the best first; write the best model or their average as a tar.

    The average is taken if it earns more on the same held-out tasks.
    """
    with _work_folder(settings) as name:
        received, made = Path(name) / "received", Path(name) / "made"
        received.mkdir()
        (made / MODEL).mkdir(parents=True)
        folders = _receive(received)
        loaded = _load(settings, folders[0])
        sets = [_read_set(folder, loaded.trainer) for folder in folders]
        result = _leave_better(loaded, sets, options)
        card = _card(loaded) + _note(options.nodes, result)
        model_folder.write(loaded.policy, card, made / MODEL)
        (made / RESULT).write_text(json.dumps(result))
        _send(made)


def _leave_better(
    loaded: _Loaded, sets: Sequence[weight_sets.WeightSet], options: argparse.Namespace
) -> dict[str, Any]:
    """Put the better weights into the policy: the best node's (now loaded) or the average.

    Returns mean rewards (`best`, `average`; None: only one node), and which was `chosen`.
    """
    asked = trial.choose_tasks(loaded.environment, dict(options.level))
    best = trial.rewards_of(_evaluate(loaded, asked, options))
    if len(sets) == 1:
        (mean,) = trial.common_means([best])
        return {"chosen": "best", "best": mean, "average": None}
    weight_sets.apply(loaded.trainer, weight_sets.average(sets))
    means = trial.common_means([best, trial.rewards_of(_evaluate(loaded, asked, options))])
    if means[1] > means[0]:
        chosen = "average"
    else:
        chosen = "best"
        weight_sets.apply(loaded.trainer, sets[0])
    return {"chosen": chosen, "best": means[0], "average": means[1]}


def _load(settings: Settings, checkpoints: Path | None) -> _Loaded:
    folder = StateDir(settings.node.state_dir).checkpoints if checkpoints is None else checkpoints
    if not checkpoint.exists(folder):
        raise TrainingError(f"{folder}: no checkpoint yet; let the node finish a round first")
    environment = environments.load(settings.environment)
    policy = model_setup.load_policy(settings)
    method = model_setup.settle_method(policy, settings.trainer, settings.node.state_dir)
    trainer = Trainer(policy, method, settings.generation)
    state = checkpoint.restore_weights(folder, trainer)
    if state is None:
        raise TrainingError(f"{folder}: no checkpoint yet; let the node finish a round first")
    environment.resume(state.get("environment", {}))
    model_setup.settle_form(policy, environment, settings.generation, settings.node.state_dir)
    settings = settings.model_copy(update={"trainer": method})
    return _Loaded(settings, environment, policy, trainer, state)


def _evaluate(
    loaded: _Loaded, asked: Sequence[Asked], options: argparse.Namespace
) -> list[evaluation.Score]:
    generation = loaded.settings.generation
    scores = evaluation.evaluate(
        loaded.policy,
        loaded.environment,
        generation,
        asked,
        options.tasks,
        options.seed,
        until=time.monotonic() + options.seconds,
    )
    if not any(score.tasks for score in scores):
        raise TrainingError(
            "no held-out task was answered: every prompt is over generation.max_prompt_length"
            f" ({generation.max_prompt_length} tokens)"
        )
    return scores


def _tasks(
    loaded: _Loaded,
    asked: Sequence[Asked],
    options: argparse.Namespace,
) -> dict[str, Any]:
    digest = trial.tasks_digest(loaded.environment, asked, options.tasks, options.seed)
    return {"tasks": digest, "seed": options.seed}


def _rows(scores: Sequence[evaluation.Score]) -> list[list[Any]]:
    return [[score.family, score.level, list(score.rewards)] for score in scores]


def _status(loaded: _Loaded) -> status.NodeStatus:
    """Return the node's status, with the figures of the checkpoint that was loaded."""
    node = status.read(loaded.settings.node.state_dir)
    if node is None:
        raise WorkerError(
            f"{loaded.settings.node.state_dir}: no status.json; start the worker once"
        )
    return replace(
        node,
        round=loaded.state.get("round"),
        rounds_trained=loaded.state.get("rounds_trained", 0),
        levels=loaded.environment.levels,
    )


def _card(loaded: _Loaded) -> str:
    node = _status(loaded)
    rounds = status.read_rounds(loaded.settings.node.state_dir)
    last = node.round if node.round is not None else -1
    known = [row for row in rounds if row["round"] <= last]
    return model_card(loaded.settings, node, known)


def _note(
    nodes: Sequence[str],
    result: dict[str, Any],
) -> str:
    """Return the section of the model card about the choice."""
    average = result["average"]
    rows = [f"| best node | {result['best']:.3f} |"]
    if average is not None:
        rows.append(f"| average of {len(nodes)} nodes | {average:.3f} |")
    what = "the average of the nodes'" if result["chosen"] == "average" else "the best node's"
    return (
        "\n## Harvest\n\n"
        f"These are {what} weights, chosen by the mean reward on held-out tasks. Nodes: "
        f"{', '.join(nodes) or 'one'}.\n\n"
        "| weights | held-out reward |\n| --- | --- |\n" + "\n".join(rows) + "\n"
    )


def _work_folder(settings: Settings) -> "tempfile.TemporaryDirectory[str]":
    """Return a temporary folder on the disk of the node's state, because /tmp may be in memory."""
    return tempfile.TemporaryDirectory(prefix=_WORK, dir=settings.node.state_dir)


def _read_set(folder: Path, trainer: Trainer) -> weight_sets.WeightSet:
    """Return the weights in a folder. Raises ModelError if they are not of the trainer's model."""
    try:
        weights = weight_sets.read(folder / model_folder.WEIGHTS)
    except ValueError as error:
        raise ModelError(f"{folder.name}: weights can't be read: {error}") from None
    if misfit := weight_sets.find_misfit(trainer, weights):
        raise ModelError(f"{folder.name}: weights do not fit the best node's model: {misfit}")
    return weights


def _receive(folder: Path) -> list[Path]:
    """Unpack standard input; return the folders of weights in it, the best first."""
    try:
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as tar:
            unpack(tar, folder)
    except tarfile.TarError as error:
        raise SettingsError(f"standard input: not a tar of weights: {error}") from None
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    if not found:
        raise SettingsError("standard input: no weights in it; expected folders 000, 001, ...")
    return found


def _send(folder: Path) -> None:
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, arcname=path.name)
    sys.stdout.buffer.flush()
