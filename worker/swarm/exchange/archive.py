"""Store the signed groups of our last rounds on disk, to serve them to auditors.

They survive a restart. A file is named by its round and the digest of its bytes. A round that was
repeated after a crash may have two files: the ledger says which of them the reward is for.
"""

from contextlib import suppress
from pathlib import Path

from worker.runtime.files import write_whole
from worker.swarm.protocol.messages import groups_digest

_SUFFIX = ".groups"


class Archive:
    """The newest `keep_rounds` rounds, in `folder`."""

    def __init__(self, folder: Path, keep_rounds: int) -> None:
        self._folder = folder
        self._keep_rounds = keep_rounds

    def put(self, round: int, sealed: bytes) -> str:
        """Store the groups durably and return their digest. Raises ResourceError."""
        digest = groups_digest(sealed)
        write_whole(self._folder / f"{round}-{digest}{_SUFFIX}", sealed)
        rounds = sorted({_round_of(file) for file in self._files()})
        for file in self._files():
            if _round_of(file) in rounds[: -self._keep_rounds]:
                file.unlink(missing_ok=True)
        return digest

    def find(self, digest: str) -> bytes | None:
        """Return the groups with this digest, None if they are not stored."""
        for file in self._files():
            if file.stem.endswith(f"-{digest}"):
                # A round that ends at the same time may remove the file.
                with suppress(FileNotFoundError):
                    return file.read_bytes()
        return None

    def _files(self) -> list[Path]:
        return [
            file
            for file in self._folder.glob(f"*-*{_SUFFIX}")
            if file.name.split("-")[0].isdecimal()
        ]


def _round_of(file: Path) -> int:
    return int(file.name.split("-")[0])
