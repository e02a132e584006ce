"""The wheelhouse: everything of a release that hosts without internet need, collected here.

It is stored in FOLDER under names derived from its content: collecting the same again needs no
network, and deleting the folder costs only time. pip, npm and git download it, each with its own
configuration.
"""

import fcntl
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploys import operator
from worker.errors import WorkerError
from worker.runtime.archives import unpack
from worker.runtime.files import write_whole

FOLDER = Path(__file__).parents[2] / ".cache/wheelhouse"
LOCK_FILE, FIRST_FILE = "requirements/worker.lock", "requirements/first.txt"
# Enough for a first download of torch over a slow connection.
COLLECT_SECONDS = 3600
GIT_SECONDS = 600
ANVIL_INPUTS = ("contracts/package-lock.json", "scripts/anvil")
NEEDED_FILES = (LOCK_FILE, FIRST_FILE, *ANVIL_INPUTS, "contracts/package.json")
# Files of an installed anvil that are needed to run it.
ANVIL_FILES = ("anvil", ".complete", "node_modules/@foundry-rs")


@dataclass(frozen=True, slots=True)
class Target:
    """The platform that wheels must fit.

    `machine` as in `uname -m`, `python` such as 3.11, `glibc` such as 2.36. `torch_index`: the
    package index to take torch from; None: as pip on the operator's side is configured.
    """

    machine: str
    python: str
    glibc: str
    torch_index: str | None

    def __str__(self) -> str:
        build = (self.torch_index or "pip's own").rstrip("/").rpartition("/")[2]
        return f"Python {self.python} on {self.machine} with glibc {self.glibc}, torch {build}"

    def pip_flags(self) -> list[str]:
        """Return the options of pip for downloading for this platform."""
        major, minor = (int(number) for number in self.glibc.split(".")[:2])
        tags = [f"manylinux_{major}_{n}_{self.machine}" for n in range(minor, 4, -1)]
        tags += [
            f"{kind}_{self.machine}"
            for kind in ("manylinux2014", "manylinux2010", "manylinux1", "linux")
        ]
        return [
            "--implementation",
            "cp",
            "--python-version",
            self.python,
            *(f"--platform={tag}" for tag in tags),
        ]

    def markers(self) -> dict[str, str]:
        """Return the values of environment markers on the platform."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }


@dataclass(frozen=True, slots=True)
class Parcel:
    """A file to ship: its `name` where it is used, and its `size` in bytes."""

    name: str
    sha256: str
    size: int

    @property
    def path(self) -> Path:
        return FOLDER / "files" / self.sha256


def pack_release(repository: str, commit: str) -> Parcel:
    """Pack the files of a commit as a tar. Raises WorkerError."""

    def collect(scratch: Path) -> Iterator[Path]:
        archive = scratch / "release.tar.gz"
        git = ["git", f"--git-dir={scratch}/git"]
        _run("git", "init", "--quiet", "--bare", f"{scratch}/git", timeout=GIT_SECONDS)
        options = ["--quiet", "--depth=1", *operator.read_options(repository)]
        _run(*git, "fetch", *options, repository, commit, timeout=GIT_SECONDS)
        packing = ("-c", "tar.umask=022", "archive", "--format=tar.gz", f"--output={archive}")
        _run(*git, *packing, commit, timeout=GIT_SECONDS)
        yield archive

    (parcel,) = _collected(f"release-{commit}", f"the files of {commit[:12]}", collect)
    return parcel


def pack_wheels(
    repository: str,
    commit: str,
    target: Target,
) -> list[Parcel]:
    """Collect wheels and build requirements of a commit's environment. Raises WorkerError.

    Packages in the lock file are verified by its hashes; torch and its dependencies by those of
    their index.
    """
    with _unpacked(repository, commit) as release:
        if not (release / FIRST_FILE).exists():
            raise WorkerError(
                f"commit {commit[:12]}: has no {FIRST_FILE}; it can only be deployed from its"
                " repository"
            )
        lock = (release / LOCK_FILE).read_text()
        first = (release / FIRST_FILE).read_text()
    inputs = json.dumps([asdict(target), lock, first, *_pip_sources()])
    key = hashlib.sha256(inputs.encode()).hexdigest()
    return _collected(
        f"wheels-{key[:32]}",
        f"wheels for {target}",
        lambda at: _download_all(at, lock, first, target),
    )


def pack_anvil(
    repository: str,
    commit: str,
) -> tuple[str, Parcel]:
    """Pack the commit's anvil as a tar; return it with the digest that names its folder.

    Raises WorkerError.
    """

    def collect(scratch: Path) -> Iterator[Path]:
        with _unpacked(repository, commit) as release:
            _run(str(release / "scripts/anvil"), f"{scratch}/anvil", timeout=COLLECT_SECONDS)
        archive = scratch / "anvil.tar.gz"
        # Without times and owners the same files are the same tar.
        with (
            archive.open("wb") as raw,
            gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as stream,
            tarfile.open(fileobj=stream, mode="w") as tar,
        ):
            for name in ANVIL_FILES:
                tar.add(scratch / "anvil" / name, arcname=name, filter=_nobodys)
        yield archive

    with _unpacked(repository, commit) as release:
        inputs = b"".join((release / name).read_bytes() for name in ANVIL_INPUTS)
    digest = hashlib.sha256(inputs).hexdigest()[:16]
    (parcel,) = _collected(f"anvil-{digest}", f"the anvil of {commit[:12]}", collect)
    return digest, parcel


def _nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    return entry.replace(uid=0, gid=0, uname="root", gname="root", mtime=0, deep=False)


def _collected(
    key: str,
    what: str,
    collect: Callable[[Path], Iterator[Path]],
) -> list[Parcel]:
    """Return what `collect` makes in a scratch folder, or has made before under this key."""
    manifest = FOLDER / f"{key}.json"
    with _lock(key):
        if manifest.exists():
            parcels = [Parcel(**entry) for entry in json.loads(manifest.read_text())]
            if all(parcel.path.exists() for parcel in parcels):
                return parcels
        print(f"collecting {what}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=FOLDER) as scratch:
            parcels = [_keep(file) for file in collect(Path(scratch))]
        write_whole(manifest, json.dumps([asdict(parcel) for parcel in parcels]))
        return parcels


def _keep(file: Path) -> Parcel:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    parcel = Parcel(file.name, digest, file.stat().st_size)
    parcel.path.parent.mkdir(exist_ok=True)
    file.rename(parcel.path)
    return parcel


@contextmanager
def _lock(key: str) -> Iterator[None]:
    """Lock a key: a rollout runs a program for each host, and the first one collects for all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + COLLECT_SECONDS
    with (FOLDER / f"{key}.lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Polled, because waiting in flock would block the other hosts of this run too.
                if time.monotonic() > deadline:
                    raise WorkerError(
                        f"{lock.name}: another run has been collecting for an hour; end it"
                    ) from None
                time.sleep(0.5)
        yield


@contextmanager
def _unpacked(
    repository: str,
    commit: str,
) -> Iterator[Path]:
    """Provide those files of a commit that are read or run here, for the duration of the block."""
    parcel = pack_release(repository, commit)
    with tempfile.TemporaryDirectory(prefix="release-", dir=FOLDER) as folder:
        with tarfile.open(parcel.path) as tar:
            there = [member for member in tar if member.isfile() and member.name in NEEDED_FILES]
            unpack(tar, Path(folder), there)
        yield Path(folder)


def _download_all(
    scratch: Path,
    lock: str,
    first: str,
    target: Target,
) -> Iterator[Path]:
    files = scratch / "files"
    pinned = [pin for pin in _entries(lock) if _is_needed(pin[0], target)]
    names = {canonicalize_name(requirement.name) for requirement, _ in pinned}
    versions = {requirement.name: str(requirement) for requirement, _ in _entries(first)}
    uv, torch = versions["uv"], versions["torch"]
    all_of_torch = list(_entries(_torch_pins(torch, target)))
    own = [pin for pin in all_of_torch if canonicalize_name(pin[0].name) not in names]
    index = ["--index-url", target.torch_index] if target.torch_index else []
    _download(
        files, _requirements(scratch / "lock.txt", pinned), target, "--no-deps", "--require-hashes"
    )
    _download(
        files,
        _requirements(scratch / "torch.txt", own),
        target,
        "--no-deps",
        "--require-hashes",
        *index,
    )
    _download(files, [uv], target, "--no-deps")
    for source in sorted(files.glob("*.tar.gz")):
        _download(files, _build_requirements(source), target, "--only-binary=:all:")
    yield from sorted(files.iterdir())


def _is_needed(requirement: Requirement, target: Target) -> bool:
    marker = requirement.marker
    return marker is None or marker.evaluate(target.markers())


def _entries(text: str) -> Iterator[tuple[Requirement, list[str]]]:
    """Yield the requirements of a lock file, each with its hashes."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        entry = line.strip()
        if entry and not entry.startswith("#"):
            requirement, *hashes = re.split(r"\s*--hash=", entry)
            yield Requirement(requirement), hashes


def _requirements(
    file: Path,
    entries: Sequence[tuple[Requirement, list[str]]],
) -> list[str]:
    """Write a requirements file for the target; return pip's options for it.

    Markers are evaluated for the target, since pip would evaluate them for this machine.
    """
    text = ""
    for requirement, hashes in entries:
        options = "".join(f" --hash={each}" for each in hashes)
        text += f"{requirement.name}{requirement.specifier}{options}\n"
    file.write_text(text)
    return ["--requirement", str(file)]


def _torch_pins(torch: str, target: Target) -> str:
    """Resolve torch and its dependencies for the target with uv; return them with hashes."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise WorkerError(f"no uv next to {sys.executable}; run the Python of the checkout's .venv")
    return _run(
        uv,
        "pip",
        "compile",
        "-",
        "--quiet",
        "--no-header",
        "--no-annotate",
        "--generate-hashes",
        "--only-binary=:all:",
        f"--python-version={target.python}",
        f"--python-platform={target.machine}-manylinux_2_28",
        *([f"--default-index={target.torch_index}"] if target.torch_index else _pip_sources()),
        stdin=torch,
        timeout=COLLECT_SECONDS,
    )


def _pip_sources() -> list[str]:
    """Return the sources of pip on this machine, as options of uv."""
    found = {}
    for line in _run(sys.executable, "-m", "pip", "config", "list", timeout=60).splitlines():
        key, _, value = line.partition("=")
        found[key.rpartition(".")[2]] = value.strip("'").split()
    links = [f"--find-links={each}" for each in found.get("find-links", ())]
    if found.get("no-index", ["false"])[0] in ("true", "1", "yes"):
        return [*links, "--no-index"]
    return [*links, *(f"--default-index={each}" for each in found.get("index-url", ()))]


def _build_requirements(source: Path) -> list[str]:
    """Return the build requirements of a source distribution, from its pyproject.toml."""
    with tarfile.open(source) as tar:
        names = [name for name in tar.getnames() if re.fullmatch(r"[^/]+/pyproject\.toml", name)]
        stream = tar.extractfile(names[0]) if names else None
        project = tomllib.load(stream) if stream else {}
    return list(project.get("build-system", {}).get("requires", ["setuptools>=40.8.0"]))


def _download(
    files: Path,
    what: Sequence[str],
    target: Target,
    *options: str,
) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    _run(*pip, f"--dest={files}", *target.pip_flags(), *options, *what, timeout=COLLECT_SECONDS)


def _run(
    *command: str,
    timeout: float,
    stdin: str = "",
) -> str:
    """Return the output of a program. Raises WorkerError with its last line if it fails."""
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        raise WorkerError(f"{' '.join(command[:4])}: not done after {timeout:g} s") from None
    if done.returncode:
        output = (done.stderr or done.stdout).splitlines()
        lines = [line.strip() for line in output if line.strip()] or ["no word"]
        errors = [line for line in lines if re.match(r"(ERROR|error|fatal)\b", line)] or lines
        name = Path(command[0]).name if "pip" not in command else "pip"
        raise WorkerError(
            f"{name}: {errors[0]}; the operator's machine downloads it, so it must be reachable"
        )
    return done.stdout
