"""Keep a complete snapshot of the embedded chain's state on disk, even if processes are killed.

anvil overwrites its last dump in place: if it is killed during a dump, the file is truncated and
the chain is lost. So it dumps into a draft, and each complete draft replaces the last snapshot.
(Reading the state from anvil by RPC would block all other requests: 1.8 s of processor time for
60 MB.)
"""

import logging
import threading
from pathlib import Path
from time import monotonic

from worker.errors import ResourceError
from worker.runtime.files import write_whole

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
_SHARE = 0.1
"""Largest share of time spent on snapshots; so those of a large state are less frequent."""
_WORRY_SECONDS = 60.0
_STOP_SECONDS = 60.0


class Snapshots:
    """Copy complete dumps of an anvil from `draft` to `file`, from `start` to `stop`.

    A full disk does not end the chain: it is logged, and the next dump is tried.
    """

    def __init__(self, file: Path) -> None:
        self.draft = file.with_name(f"{file.name}.draft")
        self._file = file
        self._taken: tuple[int, int] | None = None
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)

    def start(self) -> None:
        """Start the thread; call this before anvil starts.

        A draft that is left after a kill is newer than the last snapshot and replaces it first.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if self.draft.exists() and (
            not self._file.exists() or _version(self.draft) > _version(self._file)
        ):
            self._take()
        self.draft.unlink(missing_ok=True)
        self._taken = None
        self._thread.start()

    def stop(self) -> None:
        """Take a snapshot of the last dump, after anvil has ended. Raises ResourceError."""
        self._is_stopping.set()
        self._thread.join(_STOP_SECONDS)
        if self.draft.exists() and not self._take():
            log.warning(
                "the last dump is truncated; keeping the snapshot before it state=%s", self._file
            )
        self.draft.unlink(missing_ok=True)

    def _run(self) -> None:
        pause, failure, taken_at = _LOOK_SECONDS, "", monotonic()
        while not self._is_stopping.wait(pause):
            began = monotonic()
            reason = f"no complete dump in {self.draft} for {_WORRY_SECONDS:g} s"
            try:
                is_taken = self._take()
            except ResourceError as error:
                is_taken, reason = False, str(error)
            if is_taken:
                taken_at, failure = monotonic(), ""
            elif monotonic() - taken_at > _WORRY_SECONDS and reason != failure:
                failure = reason
                log.error("no snapshot of the chain: %s", reason)
            pause = max(_LOOK_SECONDS, (monotonic() - began) / _SHARE)

    def _take(self) -> bool:
        """Replace the snapshot by the draft if that is complete; return whether it is current."""
        try:
            before = _version(self.draft)
            if before == self._taken:
                return True
            content = self.draft.read_bytes()
            if _version(self.draft) != before or not _is_whole(content):
                return False
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ResourceError(f"{self.draft}: can't be read: {error.strerror}") from None
        write_whole(self._file, content.decode())
        self._taken = before
        return True


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


def _is_whole(content: bytes) -> bool:
    """Return whether JSON is complete, by its braces: the strings of a dump contain none."""
    return content.endswith(b"}") and content.count(b"{") == content.count(b"}")
