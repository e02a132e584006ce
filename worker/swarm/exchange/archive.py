"""The signed groups of our last rounds, on the disk: whoever audits our rewards gets them, also
after a restart.

A file is named by its round and the digest of its bytes. A round that was done again after a crash
may have two: the ledger says which of them the reward is for.
"""

from pathlib import Path

from worker.runtime.files import write_whole
from worker.swarm.protocol.messages import groups_digest

ARCHIVE_FOLDER = "groups"
_SUFFIX = ".groups"


class Archive:
    """The content of `folder`: the newest `keep_rounds` rounds."""

    def __init__(self, folder: Path, keep_rounds: int) -> None:
        self._folder = folder
        self._keep_rounds = keep_rounds

    def put(self, round: int, sealed: bytes) -> str:
        """Keep the groups; on return they are on the disk. Returns their digest. Raises
        ResourceError."""
        digest = groups_digest(sealed)
        write_whole(self._folder / f"{round}-{digest}{_SUFFIX}", sealed)
        rounds = sorted({_round_of(file) for file in self._files()})
        for file in self._files():
            if _round_of(file) in rounds[: -self._keep_rounds]:
                file.unlink(missing_ok=True)
        return digest

    def find(self, digest: str) -> bytes | None:
        """The groups with this digest, None if they are not kept any more or never were."""
        for file in self._files():
            if file.stem.endswith(f"-{digest}"):
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
