"""Run one part of a harvest on a host (worker/commands/harvest.py).

Its tars are sent and fetched in pieces.
"""

import base64
import shlex
from collections.abc import Iterator
from pathlib import Path

from pyinfra.api import FunctionCommand, StringCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.api.util import print_host_combined_output

from deploys.backup_fetch import PIECE, PIECE_SECONDS, piece_script
from deploys.pyinfra_ext import fact_cache
from deploys.slot_command import as_slot, folders_of_slot

FOLDER = "/var/tmp"  # noqa: S108 - a folder is made in it that only root can read
# In addition to the seconds of the evaluations: the model is loaded several times.
LOAD_SECONDS = 900
# Such as /var/tmp/hivewright-harvest-1a2b3c4d.
_NAME = "hivewright-harvest"


@operation()
def run(
    slot: str,
    part: str,
    options: str,
    seconds: str,
    file: str,
    sent: str = "",
) -> Iterator[FunctionCommand]:
    """Run `hivewright harvest PART OPTIONS` as a slot; write its output to a local `file`.

    `sent`: the local file for its standard input; empty: none. `seconds`: its time limit.
    """
    arguments = (int(slot), part, options, int(seconds), Path(file), Path(sent) if sent else None)
    yield FunctionCommand(_run, arguments, {})


def script_of(
    number: int,
    part: str,
    options: str,
    seconds: int,
    remote: str,
) -> str:
    """Return shell commands that run the part between the files `in` and `out` in `remote`.

    They print the number of bytes in `out`.
    """
    properties = (f"RuntimeMaxSec={seconds}", "Nice=10", *folders_of_slot(number))
    rest = f"{options} < {remote}/in > {remote}/out"
    command = as_slot(number, f"harvest {part}", *properties, rest=rest)
    # Only the last line of an error is the reason; warnings of libraries come before it.
    return (
        f"umask 077; touch {remote}/in; {{ {command}; }} 2> {remote}/errors"
        f" || {{ tail -n 1 {remote}/errors >&2; exit 1; }}; stat --format=%s {remote}/out"
    )


def _run(
    state: State,
    host: Host,
    number: int,
    part: str,
    options: str,
    seconds: int,
    file: Path,
    sent: Path | None,
) -> bool:
    remote = f"{FOLDER}/{_NAME}-{file.parent.name.strip('.')}-{file.name}"
    # The folder must be new: other users of the host could have made one of this name.
    if _ask(host, f"umask 077; mkdir {remote}", PIECE_SECONDS) is None:
        return False
    try:
        if sent is not None and not _send(host, sent, f"{remote}/in"):
            return False
        limit = seconds + LOAD_SECONDS
        size = _ask(host, script_of(number, part, options, limit, remote), limit + PIECE_SECONDS)
        return size is not None and _fetch(host, f"{remote}/out", int(size), file)
    finally:
        _ask(host, f"rm -rf {remote}", PIECE_SECONDS)


def _send(
    host: Host,
    file: Path,
    remote: str,
) -> bool:
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            if _ask(host, f"umask 077; base64 -d >> {remote}", PIECE_SECONDS, piece) is None:
                return False
    return True


def _fetch(
    host: Host,
    remote: str,
    size: int,
    file: Path,
) -> bool:
    with file.open("wb") as out:
        for number in range(-(-size // PIECE)):
            piece = _ask(host, piece_script(remote, number), PIECE_SECONDS)
            if piece is None:
                return False
            out.write(base64.b64decode(piece))
    return file.stat().st_size == size


def _ask(
    host: Host,
    script: str,
    seconds: int,
    content: bytes | None = None,
) -> str | None:
    """Return the host's output; None, with the output shown to the operator, on failure."""
    arguments = fact_cache.arguments_of_facts(host) | {"_timeout": seconds}
    if content is not None:
        arguments["_stdin"] = [base64.b64encode(content).decode()]
    command = StringCommand(f"sh -c {shlex.quote(script)}")
    is_done, output = host.connector.run_shell_command(command, **arguments)
    if not is_done:
        print_host_combined_output(host, output)
        return None
    return "".join(output.stdout_lines)
