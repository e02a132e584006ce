"""`hivewright fetch`: have a node's model in the folder that the nodes of a machine share (model.shared_dir).

A model is downloaded into a folder beside its own, which gets its name once it is whole: what the nodes find can be
loaded, and the next run of one that was cut off gets the files that are missing. A newer revision is not looked for:
remove the folder, and the next run gets it.
"""

import fcntl
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx2  # what huggingface_hub speaks HTTP with
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils.tqdm import disable_progress_bars

from worker import resources
from worker.errors import ModelError, ResourceError, SettingsError
from worker.policy import choice, memory, policy
from worker.settings import Model, Settings

_DESCRIPTIONS = (".json", ".model", ".txt", ".jinja")


def run(of: Settings) -> None:
    """Download the model, unless it is there or a folder of its own, and say where it is.

    Raises SettingsError without such a folder, ModelError if the model can't be had, ResourceError if the
    folder can't be had, or has no room.
    """
    model = choice.settle(of.model, of.node.state_dir)
    if model.shared_dir is None:
        raise SettingsError("model/shared_dir: none; expected the folder that models are to be downloaded to")
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        model.shared_dir.mkdir(parents=True, exist_ok=True)
        lock = (model.shared_dir / "lock").open("w")
    except OSError as error:
        raise ResourceError(
            f"{model.shared_dir} (model/shared_dir): {error.strerror}; expected a folder to write in"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who is second finds what the first has got
        folder = choice.find_folder(model)
        if folder is None and choice.is_gguf(model.name):
            folder = Path(model.name)
        folder = folder or _download(model, model.shared_dir, of.node.min_free_disk_mb)
    print(f"{model.name}: {folder}")


def _download(model: Model, shared_dir: Path, min_free_disk_mb: int) -> Path:
    known = policy.look_up(model.name)
    if isinstance(known, str):
        raise ModelError(
            f"model/name: {model.name}: not in {shared_dir}, and Hugging Face can't be reached ({known}); expected a "
            f"folder with a model, {choice.TINY}, or a machine with a way there"
        )
    sizes = {file.rfilename: file.size or 0 for file in known.siblings or ()}
    files = _needed(list(sizes))
    size_mb = sum(sizes[file] for file in files) // 10**6
    resources.require_disk(shared_dir, min_free_disk_mb + size_mb, "model/shared_dir")
    whole = choice.shared_folder(shared_dir, model.name)
    part = whole.with_name(f"{whole.name}.part")
    for left in part.rglob("*.incomplete"):  # of a run that was killed; nobody goes on with it
        left.unlink()
    try:
        policy.HUB.snapshot_download(model.name, revision=known.sha, local_dir=part, allow_patterns=files)
    except (httpx2.HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"model/name: {model.name}: the download was cut off: {memory.reason_of(error)}; run it again, and it gets "
            "the files that are missing"
        ) from None
    shutil.rmtree(part / ".cache", ignore_errors=True)
    return part.rename(whole)


def _needed(names: Sequence[str]) -> list[str]:
    """The files that a model is loaded from: not its weights in other forms, which may be many times as large."""
    own = [name for name in names if "/" not in name]
    weights = [name for name in own if name.endswith(".safetensors") and not name.startswith("consolidated")]
    weights = weights or [name for name in own if name.startswith("pytorch_model") and name.endswith(".bin")]
    return [*weights, *(name for name in own if name.endswith(_DESCRIPTIONS))]
