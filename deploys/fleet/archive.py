"""Backups on the operator's side: one file, encrypted with a passphrase.

scrypt makes the key, AES-256-GCM encrypts and vouches for the header too. The file is a line that says what it is, a
line of JSON with what it takes to decrypt, and the rest.
"""

import io
import json
import os
import secrets
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from worker.errors import SettingsError

MAGIC = b"hivewright-backup 1\n"
# 64 MiB and about a fifth of a second for each guess.
SCRYPT = {"n": 2**16, "r": 8, "p": 1}
MIN_PASSPHRASE = 8


def require_new(file: Path) -> None:
    """Raise SettingsError if no new file can be made there: before hosts are asked, which takes its time."""
    if file.exists():
        raise SettingsError(f"{file}: is there already; expected a name for a new file")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise SettingsError(f"{file}: {file.parent} is no folder that can be written to; expected one that is there")


def write(file: Path, hosts: Mapping[str, bytes], passphrase: str) -> None:
    """Write the tars of hosts, by name, into a new file. SettingsError: it is there, or the passphrase is short."""
    if len(passphrase) < MIN_PASSPHRASE:
        raise SettingsError(f"passphrase: {len(passphrase)} characters; expected at least {MIN_PASSPHRASE}")
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    header = json.dumps({"hosts": sorted(hosts), "salt": salt.hex(), "nonce": nonce.hex(), **SCRYPT}).encode() + b"\n"
    sealed = AESGCM(_key(passphrase, salt, **SCRYPT)).encrypt(nonce, _packed(hosts), MAGIC + header)
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(MAGIC + header + sealed)
            stream.flush()
            os.fsync(stream.fileno())
    except FileExistsError:
        raise SettingsError(f"{file}: is there already; expected a name for a new file") from None
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}; expected a place for a new file, nothing was written") from None


def read(file: Path, passphrase: str) -> dict[str, bytes]:
    """The tars of hosts, by name. Raises SettingsError if it is no backup, is damaged, or the passphrase is another."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}; expected a file that `hivewright fleet backup` wrote") from None
    header, newline, sealed = content.removeprefix(MAGIC).partition(b"\n")
    if not content.startswith(MAGIC) or not newline:
        raise SettingsError(f"{file}: no backup of this version; expected a file that `hivewright fleet backup` wrote")
    try:
        said: dict[str, Any] = json.loads(header)
        if (said["n"], said["r"], said["p"]) != tuple(SCRYPT.values()):
            raise ValueError("other parameters")
        key = _key(passphrase, bytes.fromhex(said["salt"]), **SCRYPT)
        packed = AESGCM(key).decrypt(bytes.fromhex(said["nonce"]), sealed, MAGIC + header + newline)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SettingsError(f"{file}: its header is damaged; take another copy of it") from None
    except InvalidTag:
        raise SettingsError(f"{file}: can't be decrypted: another passphrase, or the file is damaged") from None
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        members = [(member.name, tar.extractfile(member)) for member in tar]
        return {name: stream.read() for name, stream in members if stream is not None}


def _key(passphrase: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return Scrypt(salt=salt, length=32, n=n, r=r, p=p).derive(passphrase.encode())


def _packed(hosts: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in sorted(hosts.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o600
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()
