"""`hivewright fleet backup`: every host's identities and ledgers in one encrypted file.

Each host's part arrives in a folder next to the archive, sealed for a key that only this process
has, and is then copied into the archive in pieces.
"""

import argparse
import base64
import re
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, SealedBox

from deploys import backup_pack
from deploys.fleet import backup_file, commands
from deploys.fleet.pyinfra_process import Pyinfra, Ran, heed_signals
from worker.errors import WorkerError

SAY_SECONDS = 2.0
BACKUP_SECONDS = 3600
NOT_IN_IT = (
    "not in it: models, checkpoints, logs, settings and releases, which a deploy makes again;"
    " drafts of files; the secrets_dir and the inventory of this side: keep a copy of these"
)


def run(options: argparse.Namespace) -> None:
    """Write all identities and ledgers into one encrypted file, which must not exist yet."""
    backup_file.require_new(options.archive)
    pyinfra = Pyinfra.of_operator(options.inventory)
    names = commands.chosen(pyinfra, options.limit)
    passphrase = commands.passphrase(options.passphrase_file, is_new=True)
    backup_file.require_passphrase(passphrase)
    key = PrivateKey.generate()
    heed_signals()
    with tempfile.TemporaryDirectory(prefix=".backup-", dir=options.archive.parent) as folder:
        files = {name: Path(folder) / str(number) for number, name in enumerate(names)}
        failed = _collect(pyinfra, files, key)
        parts: dict[str, _Part] = {}
        for name, file in files.items():
            if name in failed:
                continue
            part = _Part(name, file, key)
            if part.size:
                parts[name] = part
            else:
                print(f"{name}: nothing is deployed there")
        if not parts:
            raise WorkerError(
                "no host has anything to back up, or none could be reached; nothing was written"
            )
        tars = {n: backup_file.Tar(part.size, part.pieces()) for n, part in parts.items()}
        backup_file.write(options.archive, tars, passphrase)
    for part in parts.values():
        print(f"{part.name}: {part.contents()} ({_megabytes(part.size)})")
    size = _megabytes(options.archive.stat().st_size)
    print(f"{options.archive}: identities and ledgers of {', '.join(parts)} ({size})")
    print(NOT_IN_IT, flush=True)
    if failed:
        raise WorkerError(
            f"not in it: {', '.join(f'{name} ({reason})' for name, reason in failed.items())}"
        )


def _collect(
    pyinfra: Pyinfra,
    files: Mapping[str, Path],
    key: PrivateKey,
) -> dict[str, str]:
    """Fetch each host's part into its file and report progress; return the reasons of failures."""
    public = f"key={backup_pack.KEY_PREFIX}{bytes(key.public_key).hex()}"

    def fetch(name: str) -> Ran:
        file = files[name]
        log = file.with_suffix(".log")
        return pyinfra.operation(
            name, "deploys.backup_fetch.fetch", log, public, f"file={file}", timeout=BACKUP_SECONDS
        )

    with ThreadPoolExecutor(commands.NUM_PARALLEL) as pool:
        futures = {name: pool.submit(fetch, name) for name in files}
        try:
            _report_progress(futures, files)
            ran = {name: future.result() for name, future in futures.items()}
        except BaseException:
            pyinfra.stop()
            raise
    return {name: each.reason for name, each in ran.items() if each.outcome != "done"}


def _report_progress(
    futures: Mapping[str, Future[Ran]],
    files: Mapping[str, Path],
) -> None:
    began = time.monotonic()
    waiting = set(futures.values())
    while waiting:
        _, waiting = wait(waiting, timeout=SAY_SECONDS)
        for name, future in futures.items():
            if not future.done():
                seconds = time.monotonic() - began
                print(
                    f"{name}: {_come_so_far(files[name])} ({seconds:.0f} s)",
                    file=sys.stderr,
                    flush=True,
                )


def _come_so_far(file: Path) -> str:
    size = file.with_suffix(".size")
    if not size.exists() or not file.exists():
        return "connects, or seals what it has"
    return f"{_megabytes(file.stat().st_size)} of {_megabytes(int(size.read_text() or 0))}"


@dataclass
class _Part:
    """One host's sealed part, in `file`; its `names` are known after `pieces` has been read."""

    name: str
    file: Path
    key: PrivateKey
    names: list[str] = field(default_factory=list)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        with self.file.open("rb") as stream:
            self._is_stream = stream.read(len(backup_pack.STREAM_MAGIC)) == backup_pack.STREAM_MAGIC
            self.size = (
                backup_pack.opened_size(stream)
                if self._is_stream
                else len(self._of_earlier_release())
            )
        if self._is_stream and self.size <= 0:
            # Even an empty tar has some blocks, so the size is not that of a bare host.
            raise WorkerError(f"{self.name}: what it sealed is cut off; nothing was written")

    def pieces(self) -> Iterator[bytes]:
        """Yield the host's tar. Raises WorkerError if it cannot be decrypted."""
        with self.file.open("rb") as stream:
            source = (
                backup_pack.opened(stream, self.key)
                if self._is_stream
                else iter([self._of_earlier_release()])
            )
            listing = _Listing()
            try:
                for piece in source:
                    listing.add(piece)
                    yield piece
            except (ValueError, tarfile.TarError):
                raise WorkerError(
                    f"{self.name}: what it sealed can't be opened; nothing was written"
                ) from None
        self.names = listing.names

    def _of_earlier_release(self) -> bytes:
        """Return the content of one sealed box in base64; empty for a bare host."""
        text = self.file.read_bytes()
        try:
            return bytes(SealedBox(self.key).decrypt(base64.b64decode(text))) if text else b""
        except (CryptoError, ValueError):
            raise WorkerError(
                f"{self.name}: what it sealed can't be opened; nothing was written"
            ) from None

    def contents(self) -> str:
        """Return the folders in it, each with its number of files."""
        folders = (re.sub(r"^(retired/[^/]+|[^/]+)/.*", r"\1", name) for name in self.names)
        counts = Counter(folders)
        return (
            ", ".join(f"{folder} ({count} files)" for folder, count in sorted(counts.items()))
            or "no files"
        )


class _Listing:
    """Collects the names of a tar's files from its content, piece by piece."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._rest, self._skip = bytearray(), 0

    def add(self, piece: bytes) -> None:
        self._rest += piece
        while True:
            passed = min(self._skip, len(self._rest))
            del self._rest[:passed]
            self._skip -= passed
            if self._skip or len(self._rest) < tarfile.BLOCKSIZE:
                return
            block = bytes(self._rest[: tarfile.BLOCKSIZE])
            del self._rest[: tarfile.BLOCKSIZE]
            if not block.strip(b"\0"):
                continue
            entry = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if entry.isreg():
                self.names.append(entry.name)
            self._skip = -(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
