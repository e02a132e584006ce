"""Compile the sources of this folder for this machine, and keep the library in the user's cache.

Compiling takes four seconds of processor time, and a worker starts often. The cache is
`~/.cache/hivewright` (or in XDG_CACHE_HOME); a library's name is the digest of its sources, flags,
compiler and processor.
"""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
_COMPILE_SECONDS = 180.0  # it takes four on an idle processor
_CPUINFO = Path("/proc/cpuinfo")


def compile_library(compiler: str, more_flags: Sequence[str]) -> ctypes.CDLL:
    """Return the library, compiled with additional flags, from the cache if it is there.

    Raises CalledProcessError with the compiler's output in `stderr`, TimeoutExpired and OSError.
    """
    folder = _cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="hivewright-native-") as temporary:
            return ctypes.CDLL(str(_build(compiler, more_flags, Path(temporary))))
    library = folder / f"{_digest(compiler, more_flags)}.so"
    if library.exists():
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            log.warning(
                "native library damaged, compiling it again path=%s error=%s", library, error
            )
    # Not in the system's folder for temporary files, which may be another file system.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        _build(compiler, more_flags, Path(temporary)).replace(library)
    return ctypes.CDLL(str(library))


def _cache_folder() -> Path | None:
    """Return the folder of compiled libraries; None if others can write there, too.

    A user who can write there decides what this process executes.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "hivewright" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):
        return None
    is_own = status.st_uid == os.getuid() and not status.st_mode & 0o022
    is_executable = not os.statvfs(folder).f_flag & os.ST_NOEXEC
    return folder if is_own and is_executable and os.access(folder, os.W_OK) else None


def _digest(compiler: str, more_flags: Sequence[str]) -> str:
    """Return the digest of sources, flags, compiler and processor (`-march=native`)."""
    program = Path(compiler).resolve()
    status = program.stat()
    made_of = [
        *(_flags(more_flags), _openmp(), _processor()),
        *(str(program), status.st_size, status.st_mtime_ns),
    ]
    digest = hashlib.sha256(repr(made_of).encode())
    for source in sorted(_SOURCES.glob("*.[ch]")):
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()


def _processor() -> list[str]:
    """Return the lines of /proc/cpuinfo about the processor's model and instructions."""
    try:
        lines = _CPUINFO.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    # Not MHz or bogomips: they change.
    kept = ("model", "cpu family", "vendor_id", "flags", "Features", "CPU ")
    return [platform.machine(), *(line for line in lines if line.startswith(kept))]


def _openmp() -> list[str]:
    """Return torch's own OpenMP library, so that there is one thread pool; empty: none found."""
    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))
    return [str(found[0])] if len(found) == 1 else []


def _flags(more_flags: Sequence[str]) -> list[str]:
    return ["-O3", "-march=native", "-fPIC", *more_flags, *(["-fopenmp"] if _openmp() else [])]


def _build(compiler: str, more_flags: Sequence[str], folder: Path) -> Path:
    """Compile all sources into `folder`; return the library."""
    library, flags, objects = folder / "native.so", _flags(more_flags), list[str]()
    for source in sorted(_SOURCES.glob("*.c")):
        # Not linked with -ffast-math, which would disable denormal numbers in the whole process.
        more = ["-ffast-math"] if source.stem == "native" else []
        objects.append(f"{folder}/{source.stem}.o")
        _run([compiler, *flags, *more, "-c", str(source), "-o", objects[-1]])
    _run([compiler, "-shared", *objects, *_openmp(), "-lm", "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
