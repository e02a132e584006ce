"""What the long-running roles share: an orderly end on a signal, files that are whole or not there."""

import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from worker.errors import ResourceError


def exit_on_signals() -> None:
    """Make SIGTERM and SIGINT end the process with code 0, through every `finally` on the way."""

    def leave(signum: int, frame: FrameType | None) -> None:
        # A second signal must not break the orderly end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)


def write_whole(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write `content` so that a reader, or a crash, finds the old file or the new one. Raises ResourceError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fchmod(stream.fileno(), mode)
                os.fsync(stream.fileno())
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{path}: can't be written: {error.strerror}; make room or rights in {path.parent}"
        ) from None
