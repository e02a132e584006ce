"""Write a trained policy as a folder that transformers loads, with its model card."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from worker.errors import ResourceError, SettingsError
from worker.policy import lora
from worker.policy.policy import Policy

WEIGHTS = "model.safetensors"
CARD = "README.md"


def describe(
    policy: Policy,
    card: str,
    folder: Path,
) -> None:
    """Write everything but the weights: card, configuration and tokenizer."""
    (folder / CARD).write_text(card)
    lora.save_config(policy.model, folder)
    policy.model.generation_config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def write(
    policy: Policy,
    card: str,
    folder: Path,
) -> None:
    """Write all files, with adapters merged into the weights, into an existing folder.

    Raises ResourceError if that fails.
    """
    try:
        describe(policy, card, folder)
        lora.save_merged(policy.model, folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ResourceError(f"{folder}: can't be written: {reason}; make room there") from error


def require_new(folder: Path) -> None:
    """Raise SettingsError if `folder` exists, or can't be made."""
    if folder.exists() or folder.is_symlink():
        raise SettingsError(f"--output {folder}: exists already; expected the name of a new folder")
    if not os.access(folder.parent, os.W_OK | os.X_OK):
        raise SettingsError(
            f"--output {folder}: {folder.parent} is not a folder that can be written to; expected"
            " an existing one"
        )


def make(
    folder: Path,
    fill: Callable[[Path], None],
) -> None:
    """Make `folder`, with the files that `fill` writes; it does not exist if `fill` fails."""
    require_new(folder)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as parent:
        unfinished = Path(parent) / folder.name
        unfinished.mkdir()
        fill(unfinished)
        shutil.move(unfinished, folder)
