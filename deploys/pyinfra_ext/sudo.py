"""sudo with a password: checked once, when a host is connected to.

pyinfra would notice only at its first command, and prompt at the terminal for all hosts at the same
time; without a terminal its run would end. Here the password comes from a local file
(`_sudo_password_file`), and if sudo refuses, only that host fails, with the reason.
"""

import shlex
from collections.abc import Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from paramiko import SSHException
from pyinfra.api import StringCommand
from pyinfra.api.exceptions import ConnectError, PyinfraError
from pyinfra.api.host import Host
from pyinfra.connectors import local, ssh, util
from pyinfra.connectors.local import LocalConnector
from pyinfra.connectors.ssh import SSHConnector

from worker.errors import SecretError
from worker.runtime.files import LINE, read_secret

PASSWORD_FILE = "_sudo_password_file"  # noqa: S105 - a key
PASSWORD = "_sudo_password"  # noqa: S105 - a key of pyinfra's
EXPECTED = "a file on this side with one line, the password that sudo asks for"
ASK_SECONDS = 30
# Without -k a password that was given a minute ago would count; in the C locale sudo's messages are
# known.
_WITHOUT_PASSWORD = "LC_ALL=C sudo -k -n"  # noqa: S105 - a command
_ASKS = (
    "a password is required",
    "interactive authentication is required",
    "a terminal is required",
)
# Key under which pyinfra's connectors store a typed password, for commands without their own.
_TYPED = "prompted_sudo_password"

# Hosts that were refused -> why.
refused: dict[str, str] = {}


def check_on_connect() -> None:
    """Check sudo on each host that uses it when connecting, without prompts; for config.py."""
    for connector in (SSHConnector, LocalConnector):
        connector.connect = _checked(connector.connect)
    for module in (ssh, local):
        module.execute_command_with_sudo_retry = _without_question


def mistakes(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the mistakes in the password that an inventory names, without the password."""
    file = data.get(PASSWORD_FILE)
    if file is None:
        return
    if not isinstance(file, str):
        yield f"{PASSWORD_FILE}: got a value of type {type(file).__name__}; expected {EXPECTED}"
        return
    if not data.get("_sudo"):
        yield (
            f"{PASSWORD_FILE}: is set and _sudo is not; set _sudo to True, or leave the"
            " password out"
        )
    if data.get(PASSWORD):
        yield f"{PASSWORD_FILE}: is set, and {PASSWORD} too; expected one of them, better the file"
    try:
        _read(file)
    except SecretError as error:
        yield f"{PASSWORD_FILE}: {error}"


def _read(file: str) -> str:
    return read_secret(Path(file), EXPECTED, form=LINE)


def _without_question(
    host: Host,
    arguments: Any,
    execute_command: Any,
) -> Any:
    """Replacement for pyinfra's function, which prompts for a password and retries."""
    return execute_command()


def _checked(connect: Any) -> Any:
    @wraps(connect)
    def connect_and_check(connector: Any) -> None:
        connect(connector)
        refused.pop(connector.host.name, None)
        try:
            reason = _what_is_wrong(connector)
        except (OSError, SSHException, PyinfraError) as error:
            raise ConnectError(
                f"sudo could not be tried: {error or type(error).__name__}"
            ) from error
        if reason:
            refused[connector.host.name] = reason
            raise ConnectError(reason)

    return connect_and_check


def _what_is_wrong(connector: Any) -> str | None:
    """Return why sudo fails on a host that was just connected to; None: it works or is unused."""
    data = connector.host.data.dict()
    if not data.get("_sudo"):
        return None
    connector.host.connector_data.pop(_TYPED, None)
    as_user = {"_sudo_user": data["_sudo_user"]} if data.get("_sudo_user") else {}
    user = data.get("ssh_user") or "this user"
    file, password = data.get(PASSWORD_FILE), data.get(PASSWORD)
    if file is None and not password:
        target = f"-u {shlex.quote(data['_sudo_user'])} " if as_user else ""
        command = StringCommand(f"{_WITHOUT_PASSWORD} {target}true")
        is_done, output = connector.run_shell_command(command, _timeout=ASK_SECONDS)
        return None if is_done else _refusal(user, _last_line(output))
    try:
        password = password or _read(str(file))
    except SecretError as error:
        return f"{PASSWORD_FILE}: {error}"
    connector.host.connector_data[_TYPED] = password
    is_done, output = connector.run_shell_command(
        StringCommand("true"), _sudo=True, _timeout=ASK_SECONDS, **as_user
    )
    if is_done:
        return None
    source = f"{file} ({PASSWORD_FILE})" if file is not None else PASSWORD
    return f"sudo does not accept the password of {user} in {source}: {_last_line(output)}"


def _refusal(user: str, said: str) -> str:
    if any(words in said for words in _ASKS):
        return (
            f"sudo asks for the password of {user}: write it into a file that only you can read and"
            f" name that in {PASSWORD_FILE}, or let sudo do without (NOPASSWD in /etc/sudoers.d on"
            " the host)"
        )
    return (
        f"sudo does not work for {user}: {said}; let them become root by sudo, or deploy as root"
        " without _sudo"
    )


def _last_line(output: util.CommandOutput) -> str:
    lines = [line.strip() for line in output.output_lines if line.strip()]
    # sudo says "try again" before it says why it gives up.
    return lines[-1] if lines else "no answer"
