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

from worker.errors import SettingsError, WorkerError

MAGIC = b"hivewright-backup 2\n"
MAGIC_1 = b"hivewright-backup 1\n"
CHUNK = 1 << 20
_TAG = 16
_SALT, _NONCE, _NONCE_1 = 16, 7, 12
# Parameters of scrypt: 64 MiB and about a fifth of a second per guess.
SCRYPT = {"n": 2**16, "r": 8, "p": 1}
MIN_PASSPHRASE = 8
_LONGEST_HEADER = 1 << 20


def require_new(file: Path) -> None:
    """Raise SettingsError if no new file can be made there, before hosts are asked."""
    try:
        is_there = file.exists()
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}; expected a place for a new file") from None
    if is_there:
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
    header = _Header(
        hosts={name: tar.size for name, tar in hosts.items()},
        salt=secrets.token_bytes(_SALT),
        nonce=secrets.token_bytes(_NONCE),
    )
    contents = _whole(hosts)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with os.fdopen(os.open(file, flags, 0o600), "wb") as stream:
            try:
                _write_chunks(stream, header, contents, passphrase)
                os.fsync(stream.fileno())
            except BaseException:
                # An incomplete backup is useless.
                file.unlink(missing_ok=True)
                raise
    except FileExistsError:
        raise SettingsError(f"{file}: is there already; expected a name for a new file") from None
    except OSError as error:
        raise SettingsError(
            f"{file}: {error.strerror}; expected a place for a new file, nothing was written"
        ) from None


def pieces(
    file: Path,
    passphrase: str,
) -> Iterator[tuple[str, bytes]]:
    """Yield the contents of a backup in order: the name of a host, and a piece of its tar.

    Every host occurs at least once. Raises SettingsError if the file is not a backup or is damaged,
    or the passphrase is wrong. Only the last piece proves that nothing is missing.
    """
    try:
        with file.open("rb") as stream:
            magic = stream.read(len(MAGIC))
            if magic not in (MAGIC, MAGIC_1):
                raise SettingsError(
                    f"{file}: no backup of this version; expected a file that `hivewright fleet"
                    " backup` wrote"
                )
            line = stream.readline(_LONGEST_HEADER)
            header = _read_header(file, line, _NONCE if magic == MAGIC else _NONCE_1)
            cipher = _cipher(passphrase, header.salt)
            vouched = magic + line
            if magic == MAGIC_1:
                yield from _unpacked(cipher.decrypt(header.nonce, stream.read(), vouched))
            else:
                yield from _split(header.hosts, _chunks(stream, cipher, header.nonce, vouched))
    except OSError as error:
        raise SettingsError(
            f"{file}: {error.strerror}; expected a file that `hivewright fleet backup` wrote"
        ) from None
    except InvalidTag:
        raise SettingsError(
            f"{file}: can't be decrypted: another passphrase, or the file is damaged"
        ) from None


def _whole(hosts: Mapping[str, Tar]) -> Iterator[bytes]:
    """Yield the tars of hosts. Raises WorkerError if one has another size than the header says."""
    for name, tar in hosts.items():
        total = 0
        for piece in tar.pieces:
            total += len(piece)
            yield piece
        if total != tar.size:
            raise WorkerError(
                f"{name}: {total} bytes came; expected {tar.size}; nothing was written"
            )


@dataclass(frozen=True, slots=True)
class _Header:
    """The second line of a backup; `hosts`: the size of each host's tar, empty in version 1."""

    hosts: Mapping[str, int]
    salt: bytes
    nonce: bytes

    def line(self) -> bytes:
        header = {
            "hosts": dict(self.hosts),
            "salt": self.salt.hex(),
            "nonce": self.nonce.hex(),
            **SCRYPT,
        }
        return json.dumps(header).encode() + b"\n"


def _read_header(
    file: Path,
    line: bytes,
    nonce_length: int,
) -> _Header:
    try:
        found: dict[str, Any] = json.loads(line)
        if any(found[name] != value for name, value in SCRYPT.items()):
            raise ValueError("other parameters")
        sizes = found["hosts"] if isinstance(found["hosts"], dict) else {}
        salt, nonce = bytes.fromhex(found["salt"]), bytes.fromhex(found["nonce"])
        if len(salt) != _SALT or len(nonce) != nonce_length:
            raise ValueError("of another length")
        return _Header(sizes, salt, nonce)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SettingsError(f"{file}: its header is damaged; take another copy of it") from None


def _write_chunks(
    stream: IO[bytes],
    header: _Header,
    contents: Iterable[bytes],
    passphrase: str,
) -> None:
    vouched = MAGIC + header.line()
    cipher = _cipher(passphrase, header.salt)
    stream.write(vouched)
    number, rest = 0, bytearray()
    for piece in contents:
        rest += piece
        while len(rest) > CHUNK:
            chunk = bytes(rest[:CHUNK])
            del rest[:CHUNK]
            nonce = _nonce(header.nonce, number, is_last=False)
            stream.write(cipher.encrypt(nonce, chunk, vouched))
            number += 1
    nonce = _nonce(header.nonce, number, is_last=True)
    stream.write(cipher.encrypt(nonce, bytes(rest), vouched))
    stream.flush()


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
        is_last = not following
        yield cipher.decrypt(_nonce(nonce, number, is_last=is_last), chunk, vouched)
        if is_last:
            return
        number, chunk = number + 1, following


def _split(
    sizes: Mapping[str, int],
    chunks: Iterable[bytes],
) -> Iterator[tuple[str, bytes]]:
    """Split the content, in chunks, into the tars of hosts."""
    rest = iter(chunks)
    chunk = b""
    for name, size in sizes.items():
        left = size
        yield name, b""
        while left:
            chunk = chunk or next(rest)
            piece, chunk = chunk[:left], chunk[left:]
            left -= len(piece)
            yield name, piece
    # Read to the end, because only the end proves that nothing is missing.
    for _ in rest:
        continue


def _unpacked(packed: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the tars of hosts in a tar, the content of version 1."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            if stream is not None:
                yield member.name, stream.read()


def _nonce(
    random: bytes,
    number: int,
    *,
    is_last: bool,
) -> bytes:
    return random + number.to_bytes(4, "big") + bytes([is_last])


def _cipher(passphrase: str, salt: bytes) -> AESGCM:
    return AESGCM(Scrypt(salt=salt, length=32, **SCRYPT).derive(passphrase.encode()))
