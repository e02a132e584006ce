"""Unpack untrusted tar archives."""

import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath


def unpack(
    tar: tarfile.TarFile,
    folder: Path,
    members: Iterable[tarfile.TarInfo] | None = None,
) -> None:
    """Write the files and folders of `tar`, or those in `members`, below `folder`.

    Owners, modes and times are ignored. Raises TarError for links, devices, names that lead out of
    the folder, and a name that is both a file and a folder; OSError if the disk is full.
    (`extractall(filter="data")` does the same from Python 3.11.4 on; hosts with Debian 12 have
    3.11.2.)
    """
    for member in tar if members is None else members:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or "\0" in member.name:
            raise tarfile.TarError(f"{member.name!r}: expected a name within the archive")
        try:
            _write(tar, member, folder / path)
        except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            raise tarfile.TarError(
                f"{member.name!r}: {error.strerror}; expected each name once"
            ) from None


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    content = tar.extractfile(member) if member.isfile() else None
    if content is None:
        raise tarfile.TarError(f"{member.name!r}: expected a file or a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with content, target.open("wb") as file:
        shutil.copyfileobj(content, file)
