"""Backups on the operator's side: one file, encrypted with a passphrase.

scrypt derives the key; AES-256-GCM encrypts the content in chunks and authenticates the header. The
file consists of a magic line, a line of JSON with the parameters and the size of each host's tar,
and the tars. A chunk's nonce contains a random part, its number, and whether it is the last, so no
chunk can be moved, removed or added. Version 1, which is still read, is one chunk with a tar of
tars.
"""

import io
import json
import os
import secrets
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from worker.errors import SettingsError

MAGIC = b"hivewright-backup 2\n"
MAGIC_1 = b"hivewright-backup 1\n"
CHUNK = 1 << 20
_TAG = 16
# 64 MiB and about a fifth of a second for each guess.
SCRYPT = {"n": 2**16, "r": 8, "p": 1}
MIN_PASSPHRASE = 8
_LONGEST_HEADER = 1 << 20


def require_new(file: Path) -> None:
    """Raise SettingsError if no new file can be made there, before hosts are asked."""
    if file.exists():
        raise SettingsError(f"{file}: is there already; expected a name for a new file")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise SettingsError(
            f"{file}: {file.parent} is not a folder that can be written to; expected an"
            " existing one"
        )


def require_passphrase(passphrase: str) -> None:
    """Raise SettingsError if the passphrase is too short to protect anything."""
    if len(passphrase) < MIN_PASSPHRASE:
        raise SettingsError(
            f"passphrase: {len(passphrase)} characters; expected at least {MIN_PASSPHRASE}"
        )


@dataclass(frozen=True, slots=True)
class Tar:
    """A host's tar to be written: its size, and its content in pieces."""

    size: int
    pieces: Iterable[bytes]


def write(
    file: Path,
    hosts: Mapping[str, Tar],
    passphrase: str,
) -> None:
    """Write the tars of hosts, by name, into a new file.

    Raises SettingsError if the file exists or cannot be written, or the passphrase is too short.
    """
    require_passphrase(passphrase)
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(7)
    sizes = {name: tar.size for name, tar in hosts.items()}
    header = (
        json.dumps({"hosts": sizes, "salt": salt.hex(), "nonce": nonce.hex(), **SCRYPT}).encode()
        + b"\n"
    )
    cipher, number, rest = AESGCM(_key(passphrase, salt, **SCRYPT)), 0, bytearray()
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            try:
                stream.write(MAGIC + header)
                for piece in (piece for tar in hosts.values() for piece in tar.pieces):
                    rest += piece
                    while len(rest) > CHUNK:
                        chunk = bytes(rest[:CHUNK])
                        del rest[:CHUNK]
                        stream.write(
                            cipher.encrypt(
                                _nonce(nonce, number, is_last=False), chunk, MAGIC + header
                            )
                        )
                        number += 1
                stream.write(
                    cipher.encrypt(_nonce(nonce, number, is_last=True), bytes(rest), MAGIC + header)
                )
                stream.flush()
                os.fsync(stream.fileno())
            except BaseException:
                # Half a backup is useless.
                file.unlink(missing_ok=True)
                raise
    except FileExistsError:
        raise SettingsError(f"{file}: is there already; expected a name for a new file") from None
    except OSError as error:
        raise SettingsError(
            f"{file}: {error.strerror}; expected a place for a new file, nothing was written"
        ) from None


def read(
    file: Path,
    passphrase: str,
    only: str | None = None,
) -> dict[str, bytes]:
    """Return the tars of hosts, by name; if `only` one is wanted, the others are empty.

    Raises SettingsError if the file is not a backup or damaged, or the passphrase is wrong; the
    whole file is read in any case.
    """
    try:
        with file.open("rb") as stream:
            magic = stream.read(len(MAGIC))
            if magic not in (MAGIC, MAGIC_1):
                raise SettingsError(
                    f"{file}: no backup of this version; expected a file that `hivewright fleet"
                    " backup` wrote"
                )
            header = stream.readline(_LONGEST_HEADER)
            said = _header(file, header)
            cipher = AESGCM(_key(passphrase, bytes.fromhex(said["salt"]), **SCRYPT))
            nonce = bytes.fromhex(said["nonce"])
            if magic == MAGIC_1:
                return _unpacked(cipher.decrypt(nonce, stream.read(), magic + header))
            return _gathered(said["hosts"], _chunks(stream, cipher, nonce, magic + header), only)
    except OSError as error:
        raise SettingsError(
            f"{file}: {error.strerror}; expected a file that `hivewright fleet backup` wrote"
        ) from None
    except InvalidTag:
        raise SettingsError(
            f"{file}: can't be decrypted: another passphrase, or the file is damaged"
        ) from None


def _gathered(
    sizes: Mapping[str, int],
    chunks: Iterable[bytes],
    only: str | None,
) -> dict[str, bytes]:
    """Split the content, in chunks, into the tars of hosts; keep only those that are wanted."""
    found = {name: bytearray() for name in sizes}
    names = iter(sizes)
    name, left = "", 0
    for chunk in chunks:
        at = 0
        while at < len(chunk):
            while not left:
                name = next(names)
                left = sizes[name]
            piece = chunk[at : at + left]
            if only in (None, name):
                found[name] += piece
            at, left = at + len(piece), left - len(piece)
    return {name: bytes(tar) for name, tar in found.items()}


def _header(file: Path, header: bytes) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads(header)
        if (said["n"], said["r"], said["p"]) != tuple(SCRYPT.values()):
            raise ValueError("other parameters")
        bytes.fromhex(said["salt"] + said["nonce"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SettingsError(f"{file}: its header is damaged; take another copy of it") from None
    return said


def _chunks(
    stream: IO[bytes],
    cipher: AESGCM,
    nonce: bytes,
    vouched: bytes,
) -> Iterator[bytes]:
    """Yield the content in order. Raises InvalidTag if anything was changed."""
    number, chunk = 0, stream.read(CHUNK + _TAG)
    while True:
        following = stream.read(CHUNK + _TAG)
        yield cipher.decrypt(_nonce(nonce, number, is_last=not following), chunk, vouched)
        if not following:
            return
        number, chunk = number + 1, following


def _nonce(
    random: bytes,
    number: int,
    *,
    is_last: bool,
) -> bytes:
    return random + number.to_bytes(4, "big") + bytes([is_last])


def _unpacked(packed: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        members = [(member.name, tar.extractfile(member)) for member in tar]
        return {name: stream.read() for name, stream in members if stream is not None}


def _key(
    passphrase: str,
    salt: bytes,
    n: int,
    r: int,
    p: int,
) -> bytes:
    return Scrypt(salt=salt, length=32, n=n, r=r, p=p).derive(passphrase.encode())
