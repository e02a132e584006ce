"""Keeps the embedded chain's state on the disk, so that whatever is killed, and when, a whole one
is there.

anvil writes each dump over the last one in place: killed in one, it leaves a file that is cut
short, and no chain. So it dumps into a draft, and each draft that is whole takes the place of the
last snapshot. (Asking anvil for its state instead would keep it from answering anything else: 1.8 s
of processor time for 60 MB.)
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
"""At most so much of the time goes into snapshots: those of a large state are further apart."""
_WORRY_SECONDS = 60.0
_STOP_SECONDS = 60.0


class Snapshots:
    """Follows the dumps of an anvil in `draft` with snapshots in `file`, from `start` to `stop`.

    A disk that is full does not end the chain: the log says so, and the next one is tried.
    """

    def __init__(self, file: Path) -> None:
        self.draft = file.with_name(f"{file.name}.draft")
        self._file = file
        self._taken: tuple[int, int] | None = None
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)

    def start(self) -> None:
        """To be called before anvil is started: what it dumped when we were killed is newer than
        our last snapshot."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if self.draft.exists() and (
            not self._file.exists() or _version(self.draft) > _version(self._file)
        ):
            self._take()
        self.draft.unlink(missing_ok=True)
        self._taken = None
        self._thread.start()

    def stop(self) -> None:
        """To be called when anvil has ended: take what it dumped on its way out. Raises
        ResourceError."""
        self._is_stopping.set()
        self._thread.join(_STOP_SECONDS)
        if self.draft.exists() and not self._take():
            log.warning("last dump cut short, the snapshot before it stays state=%s", self._file)
        self.draft.unlink(missing_ok=True)

    def _run(self) -> None:
        pause, failure, taken_at = _LOOK_SECONDS, "", monotonic()
        while not self._is_stopping.wait(pause):
            began = monotonic()
            try:
                is_taken, reason = (
                    self._take(),
                    f"no whole dump in {self.draft} for {_WORRY_SECONDS:g} s",
                )
            except ResourceError as error:
                is_taken, reason = False, str(error)
            if is_taken:
                taken_at, failure = monotonic(), ""
            elif monotonic() - taken_at > _WORRY_SECONDS and reason != failure:
                failure = reason
                log.error("no snapshot of the chain: %s", reason)
            pause = max(_LOOK_SECONDS, (monotonic() - began) / _SHARE)

    def _take(self) -> bool:
        """Let the draft, if it is whole, take the snapshot's place. Returns whether the newest
        draft is there now."""
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
    """Return whether JSON that may be cut off anywhere is not. Its texts are hexadecimal numbers
    and names, without braces."""
    return content.endswith(b"}") and content.count(b"{") == content.count(b"}")
