"""`python -m deploys.sealing KEY`, on a host: its identities and ledgers, for one reader's eyes.

Writes a tar of them to standard output, sealed for the holder of a key (a libsodium sealed box) and in base 64: so
what passes through ssh, pyinfra and its facts is of no use to anybody else. The operator makes a key for each backup.
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

from nacl.public import PublicKey, SealedBox

STATE = Path("/var/lib/hivewright")
USER = "hivewright"
# What of a worker can't be made again, or says what it is owed.
WORKER_FILES = ("swarm.pem", "enrolment.json", "account.token", "model.json", "ledger.db")
# A wallet of its own, where it has one: the key, and which transactions it has sent.
WORKER_FOLDERS = ("wallet",)
# Of a coordinator everything counts: the chain's state, the owner's key, the account's key and its books.
SERVICE_FOLDERS = ("chain", "keeper", "account", "bootnode")
KEY_PREFIX = "x25519:"
SQLITE_MAGIC = b"SQLite format 3\0"
NUM_READS = 5


def kept_files(state: Path) -> Iterator[Path]:
    """The files that a backup holds, those that are there."""
    # Of slots that the inventory no longer has too: only here their identities are kept.
    for folder in sorted([*state.glob("worker-*"), *state.glob("retired/worker-*")]):
        yield from (folder / name for name in WORKER_FILES if (folder / name).is_file())
        for name in WORKER_FOLDERS:
            yield from _whole_folder(folder / name)
    for parent in (state, *sorted(state.glob("retired/coordinator-*"))):
        for name in SERVICE_FOLDERS:
            yield from _whole_folder(parent / name)


def _whole_folder(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != "lock" and not file.name.endswith(("-wal", "-shm", "-journal")):
            yield file


def pack(state: Path) -> bytes:
    """A tar of them, with paths below `state`. Raises OSError or ValueError if a file can't be read whole."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for file in kept_files(state):
            content = read_whole(file)
            entry = tarfile.TarInfo(str(file.relative_to(state)))
            entry.size, entry.mode, entry.mtime = len(content), 0o600, int(file.stat().st_mtime)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def read_whole(file: Path) -> bytes:
    """The content, also while its owner writes: a database through sqlite, JSON again until it is whole."""
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
    raise ValueError(f"{file}: no JSON, {NUM_READS} times in a row; expected a file that its service has written whole")


def _read_own(file: Path) -> bytes:
    """The content of a file that is no link: a link may lead to another slot's key, which this user can read too."""
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
        return stream.read()


def _copy_database(file: Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.db"
        source, target = sqlite3.connect(f"file:{file}?mode=ro", uri=True), sqlite3.connect(copy)
        try:
            source.backup(target)
        finally:
            source.close()
            target.close()
        return copy.read_bytes()


def seal(content: bytes, key: str) -> str:
    """Base 64 of `content`, sealed for the holder of `key` (x25519:HEX)."""
    public = PublicKey(bytes.fromhex(key.removeprefix(KEY_PREFIX)))
    return base64.encodebytes(SealedBox(public).encrypt(content)).decode()


def become_user(name: str) -> None:
    """Be the services' user from now on, if this is root: it would follow the links that may be in his folders."""
    if os.geteuid() == 0:
        user = pwd.getpwnam(name)
        os.initgroups(name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)


if __name__ == "__main__":
    become_user(USER)
    sys.stdout.write(seal(pack(STATE), sys.argv[1]))
