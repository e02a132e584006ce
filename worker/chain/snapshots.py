"""Keeps the embedded chain's state on the disk, so that whatever is killed, and when, a whole one is there.

anvil's own dumps write over the last one in place: killed in one, it leaves a file that is cut short, and no chain. So
the state is asked for, and written beside the old one before it takes its place.
"""

import gzip
import logging
import threading
from pathlib import Path
from time import monotonic

from web3 import Web3
from web3.types import RPCEndpoint

from worker.chain import connection
from worker.errors import ChainError, ChainUnreachable, ResourceError
from worker.service import write_whole

log = logging.getLogger(__name__)

_SECONDS = 1.0
_SHARE = 0.1
"""At most so much of the time goes into snapshots: those of a large state are further apart."""
_PATIENCE_SECONDS = 120.0
_DUMP_STATE = RPCEndpoint("anvil_dumpState")


class Snapshots:
    """Writes the state of the anvil at `url` to `file` about every second, from `start` to `stop`.

    A disk that is full does not end the chain: the log says so, and the next one is tried.
    """

    def __init__(self, url: str, file: Path) -> None:
        self._url = url
        self._file = file
        self._web3: Web3 = connection.connect(url, _PATIENCE_SECONDS)
        self._block: int | None = None
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and write a last one. Raises ChainError if anvil does not answer, ResourceError."""
        self._is_stopping.set()
        self._thread.join(_PATIENCE_SECONDS)
        self._write()

    def _run(self) -> None:
        pause, failure = _SECONDS, ""
        while not self._is_stopping.wait(pause):
            began = monotonic()
            try:
                self._write()
                failure = ""
            except ResourceError as error:
                if str(error) != failure:
                    log.error("snapshot not written error=%s", error)
                failure = str(error)
            except ChainError as error:
                # Who runs anvil sees to that.
                log.debug("no snapshot error=%s", error)
            pause = max(_SECONDS, (monotonic() - began) / _SHARE)

    def _write(self) -> None:
        with connection.translated(self._url, _PATIENCE_SECONDS):
            block = self._web3.eth.block_number
            if block == self._block:
                return
            answer = self._web3.provider.make_request(_DUMP_STATE, [])
        try:
            state = gzip.decompress(bytes.fromhex(answer["result"].removeprefix("0x"))).decode()
        except (KeyError, ValueError, OSError, EOFError):
            raise ChainUnreachable(f"{self._url}: anvil_dumpState gave no state; see anvil's own words") from None
        write_whole(self._file, state)
        self._block = block
