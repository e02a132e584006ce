"""`hivewright fleet restore` and `take-back`: identities from a backup, and undoing a move.

The host's part of the backup is sealed into a temporary file, for a key that only this process has,
and sent from there in pieces, so that neither its size nor a stolen disk matters.
"""

import argparse
import base64
import io
import re
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from nacl.public import PrivateKey

from deploys import backup_pack
from deploys.fleet import backup_file, commands, queries
from deploys.fleet.commands import ASK_SECONDS, SERVICE_SECONDS
from deploys.fleet.pyinfra_process import Pyinfra, Ran
from worker.errors import SettingsError, WorkerError

RESTORE_SECONDS = 3600


def restore(options: argparse.Namespace) -> None:
    """Restore a host's identities and ledgers from a backup, to the same or another host."""
    pyinfra = commands.pyinfra_of(options)
    known = [host["name"] for host in pyinfra.hosts(timeout=ASK_SECONDS)]
    target, source = options.to, options.source or options.to
    if target not in known:
        raise SettingsError(f"--to {target}: no such host in {pyinfra.inventory}")
    passphrase = commands.passphrase(options.passphrase_file, is_new=False)
    key = PrivateKey.generate()
    with tempfile.TemporaryDirectory(prefix="restore-") as folder:
        part = Path(folder) / "part"
        _seal_part(options.archive, passphrase, source, part, key)
        _ask_target(pyinfra, target, _keys_only(part, key))
        has_given_up = source != target and _retire(pyinfra, source, known)
        ran = _operate(
            pyinfra,
            target,
            "deploys.backup_send.restore",
            f"file={part}",
            timeout=RESTORE_SECONDS,
            stdin=bytes(key).hex(),
        )
    if ran.outcome != "done":
        then = "nothing was restored there"
        if has_given_up:
            then += f"; {_undo(pyinfra, source)}"
        raise WorkerError(f"{target}: {ran.reason}; {then}")
    print(f"{target}: has the identities and ledgers of {source}; deploy it now")


def _seal_part(
    archive: Path,
    passphrase: str,
    source: str,
    part: Path,
    key: PrivateKey,
) -> None:
    """Seal one host's tar into a file. Raises SettingsError if the archive does not have it."""
    names: dict[str, None] = {}
    with part.open("wb") as stream:
        public = bytes(key.public_key).hex()
        sealer = backup_pack.Sealer(stream, f"{backup_pack.KEY_PREFIX}{public}")
        for name, piece in backup_file.pieces(archive, passphrase):
            names[name] = None
            if name == source:
                sealer.write(piece)
        sealer.finish()
    if source not in names:
        raise SettingsError(f"--from {source}: not in {archive}; it has {', '.join(sorted(names))}")


def _keys_only(part: Path, key: PrivateKey) -> bytes:
    """Return a tar with only the slots' keys, with which the target can check for conflicts."""
    found = io.BytesIO()
    with (
        part.open("rb") as stream,
        tarfile.open(fileobj=_Reader(stream, key), mode="r|") as whole,
        tarfile.open(fileobj=found, mode="w") as keys,
    ):
        for member in whole:
            if re.fullmatch(r"worker-\d+/swarm\.pem", member.name):
                keys.addfile(member, whole.extractfile(member))
    return found.getvalue()


class _Reader(io.RawIOBase):
    """The content of a sealed stream, as a file."""

    def __init__(
        self,
        stream: IO[bytes],
        key: PrivateKey,
    ) -> None:
        self._chunks = backup_pack.opened(stream, key)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._chunks, b"")
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _ask_target(
    pyinfra: Pyinfra,
    target: str,
    keys: bytes,
) -> None:
    """Raise WorkerError if the target would refuse the content, before anything is changed."""
    ran = _operate(
        pyinfra,
        target,
        "deploys.maintenance.check_restore",
        timeout=ASK_SECONDS,
        stdin=base64.b64encode(keys).decode(),
    )
    if ran.outcome != "done":
        raise WorkerError(f"{target}: {ran.reason}; nothing was done on any host")


def _retire(
    pyinfra: Pyinfra,
    source: str,
    known: Sequence[str],
) -> bool:
    """Stop the old host's workers and set their keys aside, so that no two hosts have them.

    Returns False if the host cannot be reached or is not in the inventory.
    """
    ran = Ran("unreachable", "not in the inventory")
    if source in known:
        ran = _operate(pyinfra, source, "deploys.maintenance.retire", timeout=SERVICE_SECONDS)
    if ran.outcome == "done":
        print(
            f"{source}: stopped, its keys set aside; take its slots out of the inventory, a deploy"
            " refuses them",
            flush=True,
        )
        return True
    if ran.outcome != "unreachable":
        undone = _undo(pyinfra, source)
        raise WorkerError(f"{source}: {ran.reason}; nothing was moved; {undone}")
    print(
        f"{source}: {ran.reason}; if it comes back, it must not run with the identities that have"
        " moved",
        flush=True,
    )
    return False


def _undo(pyinfra: Pyinfra, source: str) -> str:
    """Restore the old host after a move that failed; return a description of the result."""
    ran = _operate(pyinfra, source, "deploys.maintenance.take_back", timeout=SERVICE_SECONDS)
    if ran.outcome == "done":
        return f"{source} has its keys again, and runs as before"
    return (
        f"{source} could not be given its keys back ({ran.reason}): "
        f"`hivewright fleet take-back {pyinfra.inventory} --limit {source}` tries again"
    )


def take_back(options: argparse.Namespace) -> None:
    """Put keys that a move has set aside back on their hosts, unless another host has them now."""
    pyinfra = commands.pyinfra_of(options)
    everybody = [host["name"] for host in pyinfra.hosts(timeout=ASK_SECONDS)]
    names = commands.chosen(pyinfra, options.limit)
    answers = queries.ask(
        pyinfra,
        ["deploys.facts.Identities", "deploys.facts.MovedAway"],
        everybody,
        queries.FACT_SECONDS,
    )
    identities, moved = answers.values
    givers = [name for name in names if moved.get(name)]
    if not givers:
        raise SettingsError(f"no move has set keys aside on {', '.join(names)}; nothing was done")
    commands.complain(
        answers, "; nothing was done: whether one of them has the identity now is not known"
    )
    owners = {peer_id: name for name, found in identities.items() for peer_id in found.values()}
    for name in givers:
        for number, peer_id in moved[name].items():
            if owner := owners.get(peer_id):
                raise SettingsError(
                    f"{name}: slot {number}: its identity {peer_id} is on {owner} now, and two"
                    " workers can't be one node; move it back: `hivewright fleet backup`, then"
                    f" `fleet restore --from {owner} --to {name}`"
                )
    commands.run_on_all(pyinfra, givers, "deploys.maintenance.take_back")


def _operate(
    pyinfra: Pyinfra,
    host: str,
    operation: str,
    *arguments: str,
    timeout: float,
    stdin: str | None = None,
) -> Ran:
    """Run an operation on one host, with a temporary log."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        return pyinfra.operation(host, operation, log, *arguments, timeout=timeout, stdin=stdin)
