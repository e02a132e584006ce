"""Fetch a host's sealed identities and ledgers, in pieces because a chain's state may be large."""

import base64
import shlex
from collections.abc import Iterator
from pathlib import Path

from pyinfra.api import FunctionCommand, StringCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.api.util import print_host_combined_output

from deploys.paths import CURRENT, STATE
from deploys.pyinfra_ext import fact_cache

# Bytes per command; about twice as many are in memory here for each host.
PIECE = 8 << 20
SEAL_SECONDS = 600
PIECE_SECONDS = 120
PREFIX = ".backup-"
LEFT_MINUTES = 24 * 60
"""Age at which a file is considered a leftover of a backup that was killed."""


@operation()
def fetch(
    key: str,
    file: str,
) -> Iterator[FunctionCommand]:
    """Write the tar that the host seals for the owner of `key` (backup_pack.py) to a local `file`.

    The file is empty if nothing is deployed on the host. `file`.size contains the number of bytes
    to expect.
    """
    yield FunctionCommand(_fetch, (key, file), {})


def _fetch(
    state: State,
    host: Host,
    key: str,
    file: str,
) -> bool:
    remote = f"{STATE}/{PREFIX}{key[-16:]}"
    said = _ask(host, seal_script(key, remote), SEAL_SECONDS)
    if said is None:
        return False
    try:
        size = int(said)
        Path(f"{file}.size").write_text(str(size))
        with Path(file).open("wb") as out:
            for number in range(-(-size // PIECE)):
                piece = _ask(host, piece_script(remote, number), PIECE_SECONDS)
                if piece is None:
                    return False
                out.write(base64.b64decode(piece))
        return Path(file).stat().st_size == size
    finally:
        _ask(host, f"rm -f {remote}", PIECE_SECONDS)


def seal_script(key: str, remote: str) -> str:
    """Return shell commands that write the sealed tar to root's private file, and print its size.

    Earlier releases ignore the argument `stream`.
    """
    program = f"environment/bin/python -B -m $module {shlex.quote(key)} stream"
    return (
        f"[ -d {CURRENT}/ ] || {{ echo 0; exit 0; }}; umask 077; cd {CURRENT} || exit 1;"
        # The release on the host may be an earlier one, in which the module is called `sealing`.
        " module=deploys.backup_pack; [ -e deploys/backup_pack.py ] || module=deploys.sealing;"
        f" find {STATE} -maxdepth 1 -name '{PREFIX}*' -mmin +{LEFT_MINUTES} -delete;"
        f" {program} > {remote} || {{ rm -f {remote}; exit 1; }}; stat --format=%s {remote}"
    )


def piece_script(remote: str, number: int) -> str:
    block = 1 << 20
    count = PIECE // block
    return (
        f"dd if={remote} bs={block} skip={number * count} count={count} status=none | base64"
        " --wrap=0"
    )


def _ask(
    host: Host,
    script: str,
    seconds: int,
) -> str | None:
    """Return the host's output; None, with the output shown to the operator, on failure."""
    arguments = fact_cache.arguments_of_facts(host) | {"_timeout": seconds}
    is_done, output = host.connector.run_shell_command(StringCommand(script), **arguments)
    if not is_done:
        print_host_combined_output(host, output)
        return None
    return "".join(output.stdout_lines)
