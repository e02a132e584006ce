"""Ship a release to a host without internet: its files, wheels and anvil.

wheelhouse.py collects them. All content goes through a shell's standard input (see host_files.py)
into SHIPPED, where a file's name is its digest. Only missing files are sent, interrupted transfers
resume, and damaged files are removed.
"""

import base64
import io
import shlex
import tarfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyinfra import host
from pyinfra.api import StringCommand, operation

from deploys.facts import OwnFact, Releases
from deploys.hardware import Distribution
from deploys.offline import wheelhouse
from deploys.offline.wheelhouse import Parcel, Target
from deploys.paths import ANVILS, ENVIRONMENTS, RELEASES, SHIPPED, WHEELS
from deploys.system import python_of
from worker.errors import WorkerError

PARTIAL = SHIPPED / ".partial"
# Bytes per command; about twice as many are in memory here for each host.
CHUNK = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Stock:
    """Files shipped before: digests of complete files, and sizes of incomplete ones."""

    whole: frozenset[str] = frozenset()
    begun: dict[str, int] = field(default_factory=dict)


class Shipped(OwnFact[Stock]):
    """The files that have arrived on the host."""

    def command(self) -> str:
        return (
            f"cd {SHIPPED} 2>/dev/null && {{ ls | sed 's/^/whole /';"
            f" cd {PARTIAL} 2>/dev/null && stat --format='begun %n %s' -- * 2>/dev/null; }}; true"
        )

    default = staticmethod(Stock)

    def read(self, output: list[str]) -> Stock:
        words = [line.split() for line in output]
        return Stock(
            frozenset(word[1] for word in words if word[0] == "whole"),
            {word[1]: int(word[2]) for word in words if word[0] == "begun"},
        )


class Platform(OwnFact[tuple[str, str, str] | None]):
    """Machine, Python version (3.11) and glibc version (2.36); None without that Python."""

    def command(self, python: str) -> str:
        version = "import sys; print('%d.%d' % sys.version_info[:2])"
        return (
            f"! command -v {python} >/dev/null || echo $(uname -m)"
            f' $({python} -c "{version}") $(getconf GNU_LIBC_VERSION | cut -d " " -f 2)'
        )

    def read(
        self,
        output: list[str],
    ) -> tuple[str, str, str] | None:
        words = output[0].split() if output else []
        return (words[0], words[1], words[2]) if len(words) == 3 else None


@operation()
def checkout(
    repository: str,
    commit: str,
) -> Iterator[StringCommand]:
    """Ship the files of `commit` into its release folder."""
    if commit in host.get_fact(Releases).parts:
        host.noop(f"{commit} is checked out")
        return
    yield _prepare()
    try:
        parcel = wheelhouse.pack_release(repository, commit)
    except WorkerError as error:
        yield _refuse(error)
        return
    yield from send([parcel])
    partial = RELEASES / ".partial"
    yield StringCommand(
        f"rm -rf {partial} && mkdir {partial} && tar -xzf {SHIPPED / parcel.sha256} --no-same-owner"
        f" -C {partial} && mv -T {partial} {RELEASES / commit} && rm {SHIPPED / parcel.sha256}"
    )


@operation()
def wheels(
    repository: str,
    commit: str,
    torch_index: str | None,
) -> Iterator[StringCommand]:
    """Ship the wheels of the release's environment, and link them from the release."""
    found = host.get_fact(Releases)
    if found.has(commit, ENVIRONMENTS) or found.has(commit, WHEELS):
        host.noop(f"{commit} has its wheels, or what is made from them")
        return
    yield _prepare()
    python = python_of(host.get_fact(Distribution))
    platform = host.get_fact(Platform, python=python)
    try:
        if platform is None:
            raise WorkerError(
                f"no {python} on the host, so its wheels can't be chosen; install it there"
            )
        machine, version, glibc = platform
        parcels = wheelhouse.pack_wheels(
            repository, commit, Target(machine, version, glibc, torch_index)
        )
    except WorkerError as error:
        yield _refuse(error)
        return
    yield from send(parcels)
    yield _link(parcels, RELEASES / commit)


@operation()
def anvil(
    repository: str,
    commit: str,
) -> Iterator[StringCommand]:
    """Ship the release's anvil to the folder where its own script finds it."""
    found = host.get_fact(Releases)
    if found.has(commit, ANVILS):
        host.noop(f"the anvil of {commit} is installed")
        return
    yield _prepare()
    try:
        digest, parcel = wheelhouse.pack_anvil(repository, commit)
    except WorkerError as error:
        yield _refuse(error)
        return
    folder, partial = ANVILS / digest, ANVILS / ".partial"
    if folder not in found.folders:
        yield from send([parcel])
        yield StringCommand(
            f"rm -rf {partial} && mkdir -p {partial} && tar -xzf {SHIPPED / parcel.sha256}"
            f" --no-same-owner -C {partial} && mv -T {partial} {folder} && rm"
            f" {SHIPPED / parcel.sha256}"
        )


def send(parcels: Collection[Parcel]) -> Iterator[StringCommand]:
    """Yield commands that send and verify missing files; small files are sent together."""
    stock = host.get_fact(Shipped)
    missing = [parcel for parcel in parcels if parcel.sha256 not in stock.whole]
    small: list[Parcel] = []
    for parcel in missing:
        if parcel.size > CHUNK:
            yield from _send_large(parcel, stock.begun.get(parcel.sha256, 0))
            continue
        if sum(each.size for each in small) + parcel.size > CHUNK:
            yield from _send_small(small)
            small = []
        small.append(parcel)
    if small:
        yield from _send_small(small)


def _prepare() -> StringCommand:
    return StringCommand(f"umask 022 && mkdir -p {PARTIAL} {WHEELS}")


def _send_large(
    parcel: Parcel,
    begun: int,
) -> Iterator[StringCommand]:
    """Send a file in chunks, from where an earlier run stopped; chunks may be sent twice."""
    with parcel.path.open("rb") as stream:
        start = begun if begun < parcel.size else 0
        stream.seek(start)
        while chunk := stream.read(CHUNK):
            place = (
                f"of={PARTIAL / parcel.sha256} bs=1M seek={start} oflag=seek_bytes conv=notrunc"
                " status=none"
            )
            yield from _with_stdin(f"base64 -d | dd {place}", chunk)
            start += len(chunk)
    yield StringCommand(_accept([parcel]))


def _send_small(parcels: Sequence[Parcel]) -> Iterator[StringCommand]:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for parcel in parcels:
            tar.add(parcel.path, arcname=parcel.sha256)
    unpack = f"base64 -d | tar -x --no-same-owner --no-same-permissions -C {PARTIAL}"
    yield from _with_stdin(f"{unpack} && {{ {_accept(parcels)}; }}", packed.getvalue())


def _with_stdin(
    script: str,
    content: bytes,
) -> Iterator[StringCommand]:
    """Yield a command with input, and drop the input afterwards: pyinfra keeps all commands."""
    stdin = [base64.b64encode(content).decode()]
    yield StringCommand(script, _stdin=stdin)
    stdin.clear()


def _accept(parcels: Sequence[Parcel]) -> str:
    """Return shell commands that move complete files out of PARTIAL and remove damaged ones."""
    digests = " ".join(parcel.sha256 for parcel in parcels)
    return (
        f'cd {PARTIAL} && for f in {digests}; do if [ "$(sha256sum < $f | cut -c 1-64)" = $f ];'
        ' then chmod 644 $f && sync $f && mv $f ..; else rm -f $f; echo "$f arrived damaged and'
        ' was removed; run again" >&2; exit 1; fi; done'
    )


def _link(
    parcels: Collection[Parcel],
    release: Path,
) -> StringCommand:
    """Return a command that hard-links files under their names; files without links are unused."""
    names = "\n".join(
        f"{parcel.sha256} {parcel.name}" for parcel in sorted(parcels, key=lambda p: p.name)
    )
    new = WHEELS / ".partial"
    script = (
        f'list=$(cat) && folder={WHEELS}/$(echo "$list" | sha256sum | cut -c 1-16) && rm -rf {new}'
        f' && mkdir {new} && echo "$list" | while read -r digest name; do ln {SHIPPED}/$digest'
        f' {new}/"$name" || exit 1; done && {{ [ -d $folder ] || mv -T {new} $folder; }} && rm -rf'
        f" {new} && ln -sfn $folder {release}/wheels"
    )
    return StringCommand(script, _stdin=[names])


def _refuse(error: WorkerError) -> StringCommand:
    return StringCommand(f"echo {shlex.quote(str(error))} >&2; exit 1")
