"""Store the signed groups of our last rounds on disk, to serve them to auditors.

They survive a restart. A file is named by its round and the digest of its bytes. A round that was
repeated after a crash may have two files: the ledger says which of them the reward is for.
"""

import os
import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from worker.runtime.files import write_whole
from worker.swarm.protocol.messages import groups_digest

_SUFFIX = ".groups"
_FILE = re.compile(rf"[0-9]+-.*{re.escape(_SUFFIX)}")


class Archive:
    """The newest `keep_rounds` rounds, in `folder`."""

    def __init__(self, folder: Path, keep_rounds: int) -> None:
        self._folder = folder
        self._keep_rounds = keep_rounds

    def put(self, round: int, sealed: bytes) -> str:
        """Store the groups durably and return their digest. Raises ResourceError."""
        digest = groups_digest(sealed)
        write_whole(self._folder / f"{round}-{digest}{_SUFFIX}", sealed)
        by_round: defaultdict[int, list[str]] = defaultdict(list)
        for name in self._names():
            by_round[int(name.partition("-")[0])].append(name)
        for old in sorted(by_round)[: -self._keep_rounds]:
            for name in by_round[old]:
                (self._folder / name).unlink(missing_ok=True)
        return digest

    def find(self, digest: str) -> bytes | None:
        """Return the groups with this digest, None if they are not stored."""
        for name in self._names():
            if name.endswith(f"-{digest}{_SUFFIX}"):
                # A round that ends at the same time may remove the file.
                with suppress(FileNotFoundError):
                    return (self._folder / name).read_bytes()
        return None

    def _names(self) -> list[str]:
        """Return the names of our files, listed once a round: names cost less than paths."""
        names = os.listdir(self._folder) if self._folder.exists() else []
        return [name for name in names if _FILE.fullmatch(name)]
