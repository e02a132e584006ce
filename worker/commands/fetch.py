"""`hivewright fetch`: download a node's model into the machine's shared folder.

The nodes of a machine share that folder (model.shared_dir). A model is downloaded next to its final
folder, which is renamed when complete, so nodes find only complete models, and a later run resumes
an interrupted download. To get a newer revision, remove the folder and run the command again.

The download is a separate process (worker/commands/download.py), which can be killed when it
stalls: xet has no time limit of its own.
"""

import argparse
import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import ModelInfo, constants

from worker.commands import download
from worker.errors import ModelError, ResourceError, SettingsError
from worker.policy import model_sizing, policy
from worker.runtime import host
from worker.runtime.files import read_secret
from worker.settings import Model, Settings

log = logging.getLogger(__name__)

STALL_SECONDS = 120.0
"""A download without progress for this long is killed and retried."""
ATTEMPTS = 5
PAUSE_SECONDS = 5.0
REPORT_SECONDS = 10.0
_LOOK_SECONDS = 0.5
_REVISION = ".revision"
_SAFETENSORS = re.compile(r"(?!consolidated).*\.safetensors")
_PYTORCH_WEIGHTS = re.compile(r"pytorch_model.*\.bin")
_DESCRIPTIONS = (".json", ".model", ".txt", ".jinja")
_REFUSALS = (401, 403, 404)
_MACHINE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
)
"""Errors of this machine, with which another attempt would fail too."""


def run(
    settings: Settings,
    options: argparse.Namespace | None = None,
) -> None:
    """Download the model unless it is there already or is a local folder, and print its path.

    Raises SettingsError without a shared folder or for an invalid token file, ModelError if the
    model is not available, ResourceError if the folder can't be written or is full.
    """
    model = model_sizing.settle(settings.model, settings.node.state_dir)
    if model.shared_dir is None:
        raise SettingsError("model.shared_dir: not set; expected the folder to download models to")
    token = _token(model, options.token_file if options is not None else None)
    try:
        model.shared_dir.mkdir(parents=True, exist_ok=True)
        lock = (model.shared_dir / "lock").open("w")
    except OSError as error:
        raise ResourceError(
            f"{model.shared_dir} (model.shared_dir): {error.strerror}; expected a folder to"
            " write in"
        ) from None
    with lock:
        # A second process waits here, and then finds the model that the first has downloaded.
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = model_sizing.find_folder(model)
        if folder is None and model_sizing.is_gguf(model.name):
            folder = Path(model.name)
        folder = folder or _download(model, model.shared_dir, settings.node.min_free_disk_mb, token)
    print(f"{model.name}: {folder}")


def _token(
    model: Model,
    file: Path | None,
) -> str | None:
    """Return the token for the Hub; `file`, of the command line, takes precedence."""
    if file is None and model.token_file is None:
        return None
    key = "--token-file" if file is not None else "model.token_file"
    expected = "one word, a Hugging Face token that may read the model"
    return read_secret(file or model.token_file or Path(), expected, key)


def _download(
    model: Model,
    shared_dir: Path,
    min_free_disk_mb: int,
    token: str | None,
) -> Path:
    known = policy.look_up(model.name, token)
    if isinstance(known, str):
        raise ModelError(
            f"model.name: {model.name}: not in {shared_dir}, and Hugging Face can't be reached"
            f" ({known}); expected a folder with a model, {model_sizing.TINY}, or a connection to"
            " it"
        )
    files = _needed(known)
    whole = model_sizing.shared_folder(shared_dir, model.name)
    part = whole.with_name(f"{whole.name}.part")
    _clear(part, str(known.sha))
    total = sum(file.size or 0 for file in files)
    missing_mb = (total - _num_bytes(part)) // 10**6
    host.require_disk(shared_dir, min_free_disk_mb + missing_mb, "model.shared_dir")
    with _disk_errors(part):
        part.mkdir(exist_ok=True)
        (part / _REVISION).write_text(str(known.sha))
    order = download.Order(
        parent=os.getpid(),
        endpoint=policy.HUB.endpoint,
        repo=model.name,
        revision=str(known.sha),
        folder=str(part),
        files=files,
        token=token or policy.HUB.token,
        stall_seconds=STALL_SECONDS,
    )
    _get_files(order, model.name)
    shutil.rmtree(part / ".cache", ignore_errors=True)
    (part / _REVISION).unlink()
    return part.rename(whole)


def _clear(part: Path, revision: str) -> None:
    """Remove partial files that can't be resumed: of another revision, or begun by xet."""
    mark = part / _REVISION
    if part.exists() and not (mark.is_file() and mark.read_text() == revision):
        shutil.rmtree(part)
    for left in part.rglob("*.incomplete"):
        left.unlink()


def _needed(known: ModelInfo) -> list[download.File]:
    """Return the files to load a model from, without its weights in other formats."""
    found = {file.rfilename: file for file in known.siblings or () if "/" not in file.rfilename}
    weights = [name for name in found if _SAFETENSORS.fullmatch(name)]
    if not weights:
        weights = [name for name in found if _PYTORCH_WEIGHTS.fullmatch(name)]
    descriptions = [name for name in found if name.endswith(_DESCRIPTIONS)]
    files = []
    for name in weights + descriptions:
        stored = found[name].lfs
        sha256 = None if stored is None else stored.sha256
        files.append(download.File(name, found[name].size, sha256))
    return files


def _get_files(order: download.Order, name: str) -> None:
    """Download all files of the order, in several attempts. Raises ModelError, ResourceError."""
    can_do_without = all(
        (file.size or 0) <= constants.MAX_HTTP_DOWNLOAD_SIZE for file in order.files
    )
    uses_xet = not constants.HF_HUB_DISABLE_XET
    failure = _attempt(order, name, uses_xet)
    for number in range(2, ATTEMPTS + 1):
        if failure is None:
            return
        _require_hope(order, name, failure)
        uses_xet = uses_xet and not can_do_without
        log.warning(
            "download of %s interrupted: %s; resuming%s (attempt %d of %d)",
            name,
            failure.reason,
            "" if uses_xet else ", without xet",
            number,
            ATTEMPTS,
        )
        time.sleep(PAUSE_SECONDS)
        failure = _attempt(order, name, uses_xet)
    if failure is not None:
        _require_hope(order, name, failure)
        raise ModelError(
            f"model.name: {name}: the download failed in {ATTEMPTS} attempts: {failure.reason};"
            f" check the connection to {order.endpoint}, then run this again: it resumes from"
            f" {order.folder}"
        )


def _require_hope(
    order: download.Order,
    name: str,
    failure: download.Failure,
) -> None:
    """Raise ModelError or ResourceError if another attempt would fail too."""
    if failure.status in _REFUSALS:
        has_token = isinstance(order.token, str)
        raise ModelError(
            policy.refusal(name, failure.status, failure.reason, has_token, failure.is_gated)
        )
    if failure.errno in _MACHINE_ERRORS:
        raise ResourceError(
            f"{order.folder} (model.shared_dir): {failure.reason}; make room or rights there"
        )


def _attempt(
    order: download.Order,
    name: str,
    uses_xet: bool,
) -> download.Failure | None:
    """Run the download until it ends or stalls; None: all files are there."""
    environment = dict(os.environ)
    if not uses_xet:
        environment["HF_HUB_DISABLE_XET"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.commands.download"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError), process.stdin as stream:
                stream.write(order.to_json())
            process.stdin = None
        if not _watch(process, order, name):
            arrived, size = _num_bytes(Path(order.folder)), _size(order)
            return download.Failure(
                f"nothing arrived for {STALL_SECONDS:g} s, at {arrived / 1e6:.0f} of"
                f" {size / 1e6:.0f} MB"
            )
    finally:
        if process.poll() is None:
            process.kill()
        said, _ = process.communicate()
    if process.returncode == 0:
        return None
    try:
        return download.Failure(**json.loads(said.splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        return download.Failure(f"the process that downloads ended with code {process.returncode}")


def _watch(
    process: "subprocess.Popen[str]",
    order: download.Order,
    name: str,
) -> bool:
    """Report progress until the download has ended; return False if it stalls."""
    folder = Path(order.folder)
    state, changed = _state(folder), time.monotonic()
    reported, reported_bytes = changed, _num_bytes(folder)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_SECONDS)
            return True
        now = time.monotonic()
        if (new := _state(folder)) != state:
            state, changed = new, now
        if now - changed >= STALL_SECONDS:
            return False
        if now - reported >= REPORT_SECONDS:
            arrived = _num_bytes(folder)
            speed = max(arrived - reported_bytes, 0) / (now - reported)
            shown = f"{arrived / 1e6:.0f} of {_size(order) / 1e6:.0f} MB, {speed / 1e6:.1f} MB/s"
            print(f"downloading {name}: {shown}", file=sys.stderr, flush=True)
            reported, reported_bytes = now, arrived


def _size(order: download.Order) -> int:
    return sum(file.size or 0 for file in order.files)


def _stats(folder: Path) -> Iterator[os.stat_result]:
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                yield path.stat()


def _state(folder: Path) -> Sequence[object]:
    """Return a value that changes with every byte that arrives or is verified."""
    stats = _stats(folder)
    return sorted((stat.st_ino, stat.st_size, stat.st_blocks, stat.st_mtime_ns) for stat in stats)


def _num_bytes(folder: Path) -> int:
    """Return the bytes that have arrived; files may be preallocated."""
    return sum(min(stat.st_size, stat.st_blocks * 512) for stat in _stats(folder))


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{folder} (model.shared_dir): {error.strerror}; make room or rights there"
        ) from None
