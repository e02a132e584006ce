"""Restore a host's part of a backup, sent in pieces: a chain's state may be large."""

import base64
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from nacl.public import PrivateKey
from pyinfra.api import FunctionCommand, StringCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.api.util import print_host_combined_output

from deploys import backup_pack, locks
from deploys.maintenance import restore_script
from deploys.node_identity import standard_input
from deploys.paths import STATE
from deploys.pyinfra_ext import fact_cache

# Bytes per command; about twice as many are in memory here.
PIECE = 8 << 20
PIECE_SECONDS = 120
UNPACK_SECONDS = 600
PREFIX = ".restore-"


@operation()
def restore(file: str) -> Iterator[FunctionCommand]:
    """Restore the tar in a local file, sealed for the key on standard input (hexadecimal).

    It refuses what `maintenance.check_restore` refuses; on failure no new file stays. If it is
    killed here, the tar stays on the host until the next restore or an uninstall.
    """
    remote = f"{STATE}/{PREFIX}{Path(file).parent.name.strip('.')}"
    script = locks.held(restore_script(STATE, content=f"cat {remote}/tar"))
    yield FunctionCommand(_send, (file, remote, script), {})


def _send(
    state: State,
    host: Host,
    file: str,
    remote: str,
    script: str,
) -> bool:
    key = PrivateKey(bytes.fromhex(standard_input().strip()))
    parent = Path(remote).parent
    # If two run at the same time, which is a mistake, the first fails at its next piece.
    sweep = f"mkdir -p -m 755 {parent} && rm -rf {parent}/{PREFIX}*"
    if not _run(host, f"{sweep} && umask 077 && mkdir {remote}", PIECE_SECONDS):
        return False
    try:
        with Path(file).open("rb") as stream:
            for piece in pieces_of(backup_pack.opened(stream, key)):
                append = f"umask 077; base64 -d >> {remote}/tar"
                if not _run(host, append, PIECE_SECONDS, piece):
                    return False
        return _run(host, script, UNPACK_SECONDS)
    finally:
        _run(host, f"rm -rf {remote}", PIECE_SECONDS)


def pieces_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Join chunks into pieces of at least PIECE bytes, except the last one."""
    piece = bytearray()
    for chunk in chunks:
        piece += chunk
        if len(piece) >= PIECE:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


def _run(
    host: Host,
    script: str,
    seconds: int,
    content: bytes | None = None,
) -> bool:
    """Run a script with input; show its output to the operator if it fails."""
    arguments = fact_cache.arguments_of_facts(host) | {"_timeout": seconds}
    if content is not None:
        arguments["_stdin"] = [base64.b64encode(content).decode()]
    command = StringCommand(f"sh -c {shlex.quote(script)}")
    is_done, output = host.run_shell_command(command, **arguments)
    if not is_done:
        print_host_combined_output(host, output)
    return bool(is_done)
