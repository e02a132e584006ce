"""Write files with a given content, sent through a shell's standard input.

pyinfra's `files.put` uses SFTP, whose error ends the run of all hosts when one host vanishes; the
error of a command fails only that host. Also, standard input does not appear in command lines, logs
or diffs, which must not contain secrets.
"""

import base64
import hashlib
import shlex
from collections.abc import Iterator
from pathlib import Path

from pyinfra import host
from pyinfra.api import StringCommand, operation

from deploys.facts import FileContent, FileState


@operation()
def file(
    path: Path,
    content: bytes,
    user: str = "root",
    group: str = "root",
    mode: str = "644",
) -> Iterator[StringCommand]:
    """Write the file with this content, owner and mode, atomically; its folder must exist.

    If the owner is not root, that user writes the file, because root would follow links in the
    user's folders.
    """
    found = host.get_fact(FileContent, path=str(path))
    if found == FileState(hashlib.sha256(content).hexdigest(), user, group, mode):
        host.noop(f"{path} is as it should be")
        return
    new = f"{path}.new"
    script = (
        f"umask 077 && base64 -d > {new} && chown {user}:{group} {new} && chmod {mode} {new} && mv"
        f" -T {new} {path}"
    )
    if user != "root":
        script = f"runuser -u {user} -- sh -c {shlex.quote(script)}"
    yield StringCommand(script, _stdin=[base64.b64encode(content).decode()])
