"""Save and restore checkpoints: the exact state of training, as safetensors and JSON, no pickle.

`FOLDER/checkpoint-00000012/` has model.safetensors (the trained parameters under their usual names:
all weights, or the adapters), optimizer.safetensors (moments, float32 masters, torch's random
states) and state.json. It is written under a temporary name, flushed to disk and renamed, so a
kill -9 or a full disk does not damage earlier checkpoints.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.errors import ModelError, ResourceError, TrainingError
from worker.trainer import weight_sets
from worker.trainer.trainer import Trainer

log = logging.getLogger(__name__)

VERSION = 1
_FIELDS = {"version": int, "model": str, "steps": int, "nonfinite_steps": int, "state": dict}
_ADVICE = "set model.name and trainer.lora back, or move the checkpoints away to start again"
_PREFIX, _UNFINISHED, _DOOMED = "checkpoint-", ".unfinished-", ".doomed-"

State = dict[str, Any]
_READ_ATTEMPTS = 5


def save(
    folder: Path,
    trainer: Trainer,
    state: State,
    keep: int,
) -> Path:
    """Write a checkpoint and return its folder; keep only the newest `keep`.

    `state` is the caller's (round, mixture): plain JSON values. Raises ResourceError if the disk is
    full or fails.
    """
    newest = max((_number(path) for path in _finished(folder)), default=0)
    final = folder / f"{_PREFIX}{newest + 1:08d}"
    unfinished = folder / f"{_UNFINISHED}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        unfinished.mkdir()
        _write(unfinished, trainer, state)
        os.rename(unfinished, final)
        _flush(folder)
        for old in _finished(folder)[:-keep]:
            _remove(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ResourceError(
            f"checkpoint {final}: can't be written: {reason}; earlier ones are kept; free space on"
            " that disk"
        ) from error
    return final


def restore(folder: Path, trainer: Trainer) -> State | None:
    """Restore `trainer` and its policy from the newest readable checkpoint; return its `state`.

    Returns None if there is no checkpoint. Raises ModelError if the checkpoint is of another model,
    TrainingError if all checkpoints are damaged.
    """
    checkpoints = _finished(folder)
    for path in reversed(checkpoints):
        try:
            weights = load_file(path / "model.safetensors")
            tensors = load_file(path / "optimizer.safetensors")
            record = json.loads((path / "state.json").read_text())
            _check(path, trainer, weights, tensors, record)
        # RecursionError: deeply nested JSON.
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            log.error("checkpoint damaged, trying the one before path=%s error=%s", path, error)
            continue
        _apply(trainer, weights, tensors, record)
        state: State = record["state"]
        return state
    if checkpoints:
        raise TrainingError(
            f"checkpoints in {folder}: none of {len(checkpoints)} can be read; restore one from a"
            " backup"
        )
    return None


def has_adapters(folder: Path) -> bool | None:
    """Return whether the newest readable checkpoint has adapters rather than all weights.

    None: there is no readable checkpoint.
    """
    for path in reversed(_finished(folder)):
        try:
            return "lora_alpha" in json.loads((path / "state.json").read_text())
        except (OSError, ValueError, RecursionError, TypeError):
            continue
    return None


def exists(folder: Path) -> bool:
    """Return whether `folder` is a checkpoint or contains a finished one."""
    return bool(_in(folder))


def restore_weights(folder: Path, trainer: Trainer) -> State | None:
    """Restore only the weights, from a checkpoint or the newest one in a folder.

    Returns its `state`, or None if there is no checkpoint. A node that trains may remove the
    checkpoint while it is read; then the newest one is looked up again. Raises as `restore` does.
    """
    for _ in range(_READ_ATTEMPTS):
        checkpoints = _in(folder)
        for path in reversed(checkpoints):
            try:
                weights = load_file(path / "model.safetensors")
                record = json.loads((path / "state.json").read_text())
                _check_record(path, trainer, weights, record)
            except (OSError, SafetensorError, ValueError, RecursionError) as error:
                if not path.exists():
                    break  # It was removed while it was read, so there is a newer one.
                log.error("checkpoint damaged, trying the one before path=%s error=%s", path, error)
                continue
            weight_sets.apply(trainer, weights)
            state: State = record["state"]
            return state
        else:
            if checkpoints:
                raise TrainingError(
                    f"checkpoints in {folder}: none of {len(checkpoints)} can be read"
                )
            return None
    raise TrainingError(
        f"checkpoints in {folder}: replaced {_READ_ATTEMPTS} times while they were read; try again"
    )


def _in(folder: Path) -> list[Path]:
    return [folder] if (folder / "state.json").exists() else _finished(folder)


def _write(
    path: Path,
    trainer: Trainer,
    state: State,
) -> None:
    save_weights(path, trainer, state)
    save_file(_training_tensors(trainer), path / "optimizer.safetensors")
    for file in path.iterdir():
        _flush(file)
    _flush(path)


def save_weights(
    path: Path,
    trainer: Trainer,
    state: State,
) -> None:
    """Write the files that `restore_weights` reads into the existing folder `path`.

    Raises OSError or SafetensorError if that fails.
    """
    # Contiguous CPU copies, because safetensors does not save views.
    weights = {name: p.detach().cpu().contiguous() for name, p in trainer.parameters.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    record = {
        "version": VERSION,
        **trainer.origin,
        "steps": trainer.steps,
        "nonfinite_steps": trainer.nonfinite_steps,
        "state": state,
    }
    (path / "state.json").write_text(json.dumps(record, indent=1))


def _training_tensors(trainer: Trainer) -> dict[str, Tensor]:
    tensors = {"random.cpu": torch.get_rng_state()}
    if trainer.policy.model.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(trainer.policy.model.device)
    for i, moments in trainer.optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{i}.{key}": value.cpu().contiguous() for key, value in moments.items()
        }
    if any(
        m.dtype != p.dtype
        for m, p in zip(trainer.masters, trainer.parameters.values(), strict=True)
    ):
        tensors |= {
            f"master.{i}": master.cpu().contiguous() for i, master in enumerate(trainer.masters)
        }
    return tensors


def _check_record(
    path: Path,
    trainer: Trainer,
    weights: dict[str, Tensor],
    record: Any,
) -> None:
    """Raise ValueError for a damaged record or weights, ModelError for those of another model."""
    if not isinstance(record, dict) or type(record.get("version")) is not int:
        raise ValueError("state.json: expected an object with a whole number as version")
    if record["version"] > VERSION:
        raise TrainingError(
            f"checkpoint {path}: version {record['version']} is newer than {VERSION}; upgrade"
            " hivewright"
        )
    for name, kind in _FIELDS.items():
        if type(record.get(name)) is not kind:
            raise ValueError(f"state.json: {name}: missing or not of type {kind.__name__}")
    if {n: t.shape for n, t in weights.items()} != {
        n: p.shape for n, p in trainer.parameters.items()
    }:
        raise ModelError(
            f"checkpoint {path}: is of model {record['model']}, whose weights do not fit"
            f" {trainer.policy.name}; {_ADVICE}"
        )
    for what, ours in trainer.origin.items():
        theirs = record.get(what, ours)  # checkpoints of 0.1.0 do not record adapters
        if theirs != ours:
            raise ModelError(
                f"checkpoint {path}: is of {what} {theirs}, and this node's is {ours}; {_ADVICE}"
            )
    _check_finite(weights)


def _check_finite(tensors: dict[str, Tensor]) -> None:
    if odd := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise ValueError(f"{odd[0]}: not finite")


def _check(
    path: Path,
    trainer: Trainer,
    weights: dict[str, Tensor],
    tensors: dict[str, Tensor],
    record: Any,
) -> None:
    """Check a whole checkpoint before any of it is applied; raise as `_check_record` does."""
    _check_record(path, trainer, weights, record)
    _check_finite(tensors)
    expected = _expected_shapes(trainer, weights, tensors)
    found = {
        name: tensor.shape for name, tensor in tensors.items() if not name.startswith("random.")
    }
    if odd := sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    ):
        raise ValueError(f"optimizer.safetensors: {odd[0]}: missing, unknown or of another shape")
    if record["steps"] > 0 and not any(name.startswith("optimizer.") for name in found):
        raise ValueError(f"optimizer.safetensors: no moments, though steps is {record['steps']}")
    _check_random(tensors, "cpu")
    if "random.cuda" in tensors and trainer.policy.model.device.type == "cuda":
        _check_random(tensors, "cuda")


def _expected_shapes(
    trainer: Trainer,
    weights: dict[str, Tensor],
    tensors: dict[str, Tensor],
) -> dict[str, torch.Size]:
    """Return the shapes of the tensors in optimizer.safetensors, except random states."""
    shapes: dict[str, torch.Size] = {}
    # A parameter without any gradient so far has no moments; others have all of them.
    started = {name.split(".")[1] for name in tensors if name.startswith("optimizer.")}
    optimized = [
        parameter for group in trainer.optimizer.param_groups for parameter in group["params"]
    ]
    for i, parameter in enumerate(optimized):
        if str(i) in started:
            shapes[f"optimizer.{i}.step"] = torch.Size()
            shapes[f"optimizer.{i}.exp_avg"] = shapes[f"optimizer.{i}.exp_avg_sq"] = parameter.shape
    if any(weight.dtype != torch.float32 for weight in weights.values()):
        shapes |= {f"master.{i}": master.shape for i, master in enumerate(trainer.masters)}
    return shapes


def _check_random(
    tensors: dict[str, Tensor],
    device: str,
) -> None:
    try:
        torch.Generator(device).set_state(tensors[f"random.{device}"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"optimizer.safetensors: random.{device}: no random state ({error})"
        ) from None


@torch.no_grad()
def _apply(
    trainer: Trainer,
    weights: dict[str, Tensor],
    tensors: dict[str, Tensor],
    record: dict[str, Any],
) -> None:
    weight_sets.apply(trainer, weights)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        elif kind == "master":
            trainer.masters[int(rest)].copy_(tensor)
    trainer.optimizer.load_state_dict(
        {"state": moments, "param_groups": trainer.optimizer.state_dict()["param_groups"]}
    )
    if "random.cuda" in tensors and trainer.policy.model.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], trainer.policy.model.device)
    torch.set_rng_state(tensors["random.cpu"])
    trainer.steps = record["steps"]
    trainer.nonfinite_steps = record["nonfinite_steps"]


def _finished(folder: Path) -> list[Path]:
    """Return the finished checkpoints, the oldest first."""
    names = folder.glob(f"{_PREFIX}*")
    return sorted((p for p in names if p.name.removeprefix(_PREFIX).isdigit()), key=_number)


def _number(path: Path) -> int:
    return int(path.name[len(_PREFIX) :])


def _remove(path: Path) -> None:
    """Rename a checkpoint, then remove it: an incomplete one must never have a valid name."""
    doomed = path.with_name(_DOOMED + path.name)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    for pattern in (f"{_UNFINISHED}*", f"{_DOOMED}*"):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:  # foreign, but it would block all later checkpoints
                path.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
