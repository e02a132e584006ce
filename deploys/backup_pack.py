"""Pack a host's identities and ledgers for one reader: `python -m deploys.backup_pack KEY stream`.

It runs on the host and writes a tar to standard output, sealed for the owner of a key: a libsodium
sealed box with the key of a libsodium secret stream, in chunks, so that a chain's state of any size
takes little memory. Only the owner of the key can read the data that passes through ssh and
pyinfra; the operator makes a key for each backup. Without `stream`, which operators with an earlier
release leave out, the output is one sealed box in base64.
"""

import base64
import io
import json
import os
import pwd
import sqlite3
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nacl import bindings
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox

from deploys.paths import STATE, USER
from deploys.services import BACKED_UP
from worker.runtime.state_dir import StateDir

# Files of a worker that can't be made again, or that record its unpaid rewards.
WORKER_FILES = (
    StateDir.identity,
    StateDir.enrolment,
    StateDir.account_token,
    StateDir.model_choice,
    StateDir.ledger,
)
# Its own wallet, if it has one: the key, and the transactions that it has sent.
WORKER_FOLDERS = (StateDir.wallet,)
KEY_PREFIX = "x25519:"
SQLITE_MAGIC = b"SQLite format 3\0"
NUM_READS = 5
DRAFTS = (".draft", ".new", ".tmp", ".partial", "-wal", "-shm", "-journal")
# Larger files are neither read into memory nor checked to be JSON.
MAX_IN_MEMORY = 8 << 20
STREAM_MAGIC = b"hivewright-sealed 2\n"
CHUNK = 1 << 20
_LENGTH = 4
_OVERHEAD = bindings.crypto_secretstream_xchacha20poly1305_ABYTES


def kept_files(state: Path) -> Iterator[Path]:
    """Yield the files of a backup that exist."""
    # Includes slots that the inventory no longer has: only these files have their identities.
    workers = [*state.glob("worker-*"), *state.glob("retired/worker-*")]
    for folder in sorted(workers):
        files = [folder / name for name in WORKER_FILES]
        yield from (file for file in files if file.is_file())
        for name in WORKER_FOLDERS:
            yield from _whole_folder(folder / name)
    coordinators = sorted(state.glob("retired/coordinator-*"))
    for parent in (state, *coordinators):
        for name in BACKED_UP:
            yield from _whole_folder(parent / name)


def _whole_folder(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != StateDir.lock and not _is_draft(file):
            yield file


def _is_draft(file: Path) -> bool:
    """Return whether a file is a draft, or a side file of a database that is copied separately."""
    return file.name.startswith(".") or file.name.endswith(DRAFTS)


def pack(state: Path) -> bytes:
    """Return the tar that `write_tar` writes, as bytes."""
    stream = io.BytesIO()
    write_tar(state, stream)
    return stream.getvalue()


def write_tar(
    state: Path,
    stream: IO[bytes],
) -> None:
    """Write a tar with paths relative to `state`.

    Raises OSError or ValueError if a file cannot be read as a whole.
    """
    with tarfile.open(fileobj=stream, mode="w|") as tar:
        for file in kept_files(state):
            entry = tarfile.TarInfo(str(file.relative_to(state)))
            entry.mode = 0o600
            entry.mtime = int(file.stat().st_mtime)
            with _open_own(file) as content:
                entry.size = os.fstat(content.fileno()).st_size
                head = content.read(len(SQLITE_MAGIC))
                if entry.size > MAX_IN_MEMORY and head != SQLITE_MAGIC:
                    # Its service replaces the file atomically, so the open file does not change.
                    content.seek(0)
                    tar.addfile(entry, content)
                    continue
            whole = read_whole(file)
            entry.size = len(whole)
            tar.addfile(entry, io.BytesIO(whole))


def read_whole(file: Path) -> bytes:
    """Return a consistent copy of a file that its owner may be writing.

    A database is copied through sqlite. JSON is read again until it parses. Raises ValueError if it
    never does.
    """
    content = _read_own(file)
    if content.startswith(SQLITE_MAGIC):
        return _copy_database(file)
    if file.suffix != ".json":
        return content
    for _ in range(NUM_READS):
        try:
            json.loads(content)
            return content
        except ValueError:
            time.sleep(0.5)
            content = _read_own(file)
    raise ValueError(
        f"{file}: no JSON, {NUM_READS} times in a row; expected a file that its service has written"
        " whole"
    )


def _read_own(file: Path) -> bytes:
    """Return the content of a file, without following links.

    A link might lead to another slot's key, which this user can read.
    """
    with _open_own(file) as stream:
        return stream.read()


def _open_own(file: Path) -> IO[bytes]:
    return os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def _copy_database(file: Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.db"
        source = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
        target = sqlite3.connect(copy)
        try:
            source.backup(target)
        finally:
            source.close()
            target.close()
        return copy.read_bytes()


def seal(content: bytes, key: str) -> str:
    """Return `content` sealed for the owner of `key` (x25519:HEX), in base64."""
    public = PublicKey(bytes.fromhex(key.removeprefix(KEY_PREFIX)))
    return base64.encodebytes(SealedBox(public).encrypt(content)).decode()


class Sealer(io.RawIOBase):
    """A writable stream that seals its content for the owner of `key` and writes it to `out`."""

    def __init__(
        self,
        out: IO[bytes],
        key: str,
    ) -> None:
        self._out, self._rest = out, bytearray()
        own = bindings.crypto_secretstream_xchacha20poly1305_keygen()
        self._state = bindings.crypto_secretstream_xchacha20poly1305_state()
        header = bindings.crypto_secretstream_xchacha20poly1305_init_push(self._state, own)
        public = PublicKey(bytes.fromhex(key.removeprefix(KEY_PREFIX)))
        out.write(STREAM_MAGIC + SealedBox(public).encrypt(own) + header)

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self._rest += content
        while len(self._rest) > CHUNK:
            self._push(
                bytes(self._rest[:CHUNK]),
                bindings.crypto_secretstream_xchacha20poly1305_TAG_MESSAGE,
            )
            del self._rest[:CHUNK]
        return len(content)

    def finish(self) -> None:
        """Write the end mark; without it the reader reports a truncated stream."""
        self._push(bytes(self._rest), bindings.crypto_secretstream_xchacha20poly1305_TAG_FINAL)

    def _push(
        self,
        content: bytes,
        tag: int,
    ) -> None:
        sealed = bindings.crypto_secretstream_xchacha20poly1305_push(
            self._state, content, None, tag
        )
        self._out.write(len(sealed).to_bytes(_LENGTH, "big") + sealed)


def opened(
    stream: IO[bytes],
    key: PrivateKey,
) -> Iterator[bytes]:
    """Yield the chunks that a Sealer wrote.

    Raises ValueError if the stream is damaged, truncated, or sealed for another key.
    """
    head = len(STREAM_MAGIC)
    if stream.read(head) != STREAM_MAGIC:
        raise ValueError("no sealed stream")
    size = bindings.crypto_secretstream_xchacha20poly1305_KEYBYTES + bindings.crypto_box_SEALBYTES
    try:
        own = SealedBox(key).decrypt(stream.read(size))
        state = bindings.crypto_secretstream_xchacha20poly1305_state()
        header = stream.read(bindings.crypto_secretstream_xchacha20poly1305_HEADERBYTES)
        bindings.crypto_secretstream_xchacha20poly1305_init_pull(state, header, own)
        tag = None
        while tag != bindings.crypto_secretstream_xchacha20poly1305_TAG_FINAL:
            length = int.from_bytes(stream.read(_LENGTH), "big")
            if not _OVERHEAD <= length <= CHUNK + _OVERHEAD:
                raise ValueError("cut off")
            content, tag = bindings.crypto_secretstream_xchacha20poly1305_pull(
                state, stream.read(length)
            )
            yield content
    except (CryptoError, TypeError) as error:
        raise ValueError(f"can't be opened: {error}") from None


def opened_size(stream: IO[bytes]) -> int:
    """Return the number of bytes that `opened` yields, by the chunk lengths; rewind the stream."""
    key = bindings.crypto_secretstream_xchacha20poly1305_KEYBYTES + bindings.crypto_box_SEALBYTES
    stream.seek(
        len(STREAM_MAGIC) + key + bindings.crypto_secretstream_xchacha20poly1305_HEADERBYTES
    )
    total = 0
    while found := stream.read(_LENGTH):
        length = int.from_bytes(found, "big")
        total += length - _OVERHEAD
        stream.seek(length, os.SEEK_CUR)
    stream.seek(0)
    return total


def become_user(name: str) -> None:
    """Drop root privileges, because root would follow links in folders of the services' user."""
    if os.geteuid() == 0:
        user = pwd.getpwnam(name)
        os.initgroups(name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)


if __name__ == "__main__":
    become_user(USER)
    if sys.argv[2:] == ["stream"]:
        sealer = Sealer(sys.stdout.buffer, sys.argv[1])
        write_tar(STATE, sealer)  # type: ignore[arg-type]
        sealer.finish()
    else:
        sys.stdout.write(seal(pack(STATE), sys.argv[1]))
