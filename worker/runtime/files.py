"""Write files atomically, append lines to histories, and read one-line secrets."""

import errno
import os
import re
import tempfile
from pathlib import Path
from typing import IO

from worker.errors import ResourceError, SecretError
from worker.log import hide

# Keys, tokens and passwords are far shorter; a large file named by mistake is not read completely.
MAX_SECRET_BYTES = 16_384
WORD = re.compile(r"[!-~]+")
# A password: one line of visible characters and spaces.
LINE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\ufeff]+")
_PIECE_BYTES = 1 << 20
HEX_KEY = re.compile(r"(0x)?[0-9a-fA-F]{64}")


def read_secret(
    file: Path,
    expected: str,
    key: str | None = None,
    form: re.Pattern[str] = WORD,
) -> str:
    """Return the one line of a secret file, without surrounding white space.

    `key`: the setting that names the file; `form`: the pattern that the line must match (LINE for
    passwords, which may have spaces). No log line of this process shows the secret (log.hide).
    Raises SecretError with the file, the reason and the expected content, never the actual content.
    """
    reason = None
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_SECRET_BYTES + 1)
        text = content.decode().strip()
    except OSError as error:
        text, reason = "", error.strerror or type(error).__name__
    except UnicodeDecodeError:
        text, reason = "", "not UTF-8 text"
    reason = reason or _mistake(text, len(content), form)
    if reason is not None:
        where = f"{file} ({key})" if key else str(file)
        raise SecretError(f"{where}: {reason}; expected {expected}")
    hide(text)
    return text


def _mistake(
    text: str,
    num_bytes: int,
    form: re.Pattern[str],
) -> str | None:
    """Return the reason why the content of a secret file is invalid; None if it is valid."""
    if num_bytes > MAX_SECRET_BYTES:
        return f"more than {MAX_SECRET_BYTES:,} bytes"
    if not text:
        return "is empty"
    if (num_lines := len(text.splitlines())) > 1:
        return f"{num_lines} lines instead of one"
    if not LINE.fullmatch(text):
        return "has characters that can't be seen (a byte order mark, say)"
    if form is not LINE and len(text.split()) > 1:
        return f"{len(text.split())} words instead of one"
    if form.fullmatch(text):
        return None
    return "not 64 hexadecimal digits" if form is HEX_KEY else "has characters other than ASCII"


def write_whole(
    path: Path,
    content: str | bytes,
    mode: int = 0o644,
    durable: bool = True,
) -> None:
    """Replace a file atomically: a reader, or a crash, finds the old file or the new one.

    `durable`: the new file is on disk when this returns. Without it a power failure may bring the
    old file back, which is acceptable for files that are written every few seconds. Raises
    ResourceError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fchmod(stream.fileno(), mode)
                if durable:
                    os.fsync(stream.fileno())
            Path(temporary).replace(path)
            if durable:
                _sync_folder(path.parent)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{path}: can't be written: {error.strerror}; make room or rights in {path.parent}"
        ) from None


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to disk; they are not part of the files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not support it
            raise
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, and make the file if it does not exist. Raises OSError.

    A line that a crash truncated is removed first, because this one would be appended to it.
    """
    with path.open("a+b") as file:
        whole = _whole_length(file)
        if whole < file.tell():
            file.truncate(whole)
        file.write(line.encode() + b"\n")


def _whole_length(file: IO[bytes]) -> int:
    """Return the length up to the end of the last whole line; leave the file at its end."""
    end = file.seek(0, os.SEEK_END)
    length = 0
    for start in range(max(0, end - _PIECE_BYTES), -_PIECE_BYTES, -_PIECE_BYTES):
        file.seek(max(0, start))
        found = file.read(_PIECE_BYTES).rfind(b"\n")
        if found >= 0:
            length = max(0, start) + found + 1
            break
    file.seek(0, os.SEEK_END)
    return length
