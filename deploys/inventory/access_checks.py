"""Check connection keys for values with which pyinfra or paramiko would end the run of all hosts.

Their exceptions do not name the host, so each value is checked before pyinfra connects.
"""

import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from paramiko import SSHException
from pyinfra.api.arguments import all_global_arguments
from pyinfra.api.exceptions import ConnectorDataTypeError, PyinfraError
from pyinfra.api.host import Host
from pyinfra.api.util import raise_if_bad_type
from pyinfra.connectors.ssh import SSHConnector
from pyinfra.connectors.ssh_util import load_key_with_certificate

from deploys.inventory.addresses import EXPECTED_SSH_HOST, is_ssh_host
from deploys.inventory.host_plan import MAX_PORT
from deploys.inventory.schema import is_too_large
from deploys.pyinfra_ext import sudo


def access_mistakes(host: Host) -> Iterator[str]:
    """Yield a line for each mistake in ssh_port, _sudo and the like."""
    wrong = wrong_types(host)
    data = host.data.dict()
    messages = [*wrong.values(), *sudo.mistakes(data)]
    if host.connector_cls is SSHConnector:
        right = {key: data[key] for key in data.keys() - wrong if not is_too_large(data[key])}
        messages += _wrong_ssh(host.name, right)
    for message in messages:
        yield located(host, message)


def located(host: Host, message: str) -> str:
    return f"inventory data of {host.name}: {message}"


def wrong_types(host: Host) -> dict[str, str]:
    """Return messages about values of the wrong type, by key, without values of passwords."""
    data = host.data.dict()
    # pyinfra does not check its own keys, such as _sudo; few of them have other than plain types.
    own = {name: kind for name, kind in all_global_arguments() if kind in (bool, str, int)}
    kinds = own | get_type_hints(host.connector_cls.data_cls)
    wrong = {}
    for key in sorted(data.keys() & kinds.keys()):
        if is_too_large(data[key]):
            continue  # `validation.check` reports it
        try:
            raise_if_bad_type(data[key], kinds[key], ConnectorDataTypeError, key)
        except ConnectorDataTypeError:
            is_secret = "password" in key or "kwargs" in key
            value = type(data[key]).__name__ if is_secret else repr(data[key])
            wrong[key] = f"{key}: got {value}; expected {kinds[key].__name__}"
    return wrong


def _wrong_ssh(
    name: str,
    data: Mapping[str, Any],
) -> Iterator[str]:
    """Yield mistakes in values of the right type."""
    where = data.get("ssh_hostname", name)
    if where is not None and not is_ssh_host(where):
        yield f"ssh_hostname: got {where!r}; {EXPECTED_SSH_HOST}"
    port = data.get("ssh_port")
    if port is not None and not 1 <= port <= MAX_PORT:
        yield f"ssh_port: got {port}; expected a port from 1 to {MAX_PORT}"
    key = data.get("ssh_key")
    reason = _wrong_key(key, data.get("ssh_key_password") or "") if key else None
    if reason:
        yield f"ssh_key: {reason}; expected the file of a private key"


@cache
def _wrong_key(file: str, password: str) -> str | None:
    """Return why pyinfra cannot use a file as a key; None: it can."""
    try:
        load_key_with_certificate(file, password, cwd=str(Path.cwd()), allow_prompt=False)
    except PyinfraError as error:
        # At a terminal pyinfra asks for the passphrase.
        return None if "is encrypted" in str(error) and sys.stdin.isatty() else str(error)
    except (SSHException, OSError, ValueError, IndexError, AssertionError):
        # The last two come from paramiko's parser, for a truncated or damaged key.
        return f"Invalid private key file: {file}"
    return None
