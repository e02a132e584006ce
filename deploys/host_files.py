"""Files with a given content. They go through a shell's standard input, not through SFTP as
pyinfra's `files.put`.

When a host vanishes, an error of SFTP ends pyinfra's run of all hosts; that of a command fails that
host. And what goes through standard input is in no command line, no log and no diff, which is what
secrets need.
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
    path: Path, content: bytes, user: str = "root", group: str = "root", mode: str = "644"
) -> Iterator[StringCommand]:
    """Have the file with this content, owner and mode. It is replaced at once; its folder must be
    there.

    Another user than root writes it himself: in a folder of his root would follow whatever link he
    has put there.
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
