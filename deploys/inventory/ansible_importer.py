"""Hosts and variables of an Ansible inventory, from Ansible's own `ansible-inventory --list`.

Only Ansible knows all forms of its inventories (plugins, ranges, vault, precedence of variables),
so its own program reads them. Its output is accepted as well, for operators whose Ansible is on
another machine. Values that only a playbook can resolve (templates, encrypted values) are refused
by name, and so are passwords.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from deploys.inventory.schema import pick
from worker.errors import SettingsError

PROGRAM = "ansible-inventory"
READ_SECONDS = 120
UNRESOLVED = "a template, or encrypted; expected a plain value"
EXPECTED = f"the output of `{PROGRAM} --list`"
# Ansible's variable -> pyinfra's key.
ACCESS = {
    "ansible_host": "ssh_hostname",
    "ansible_ssh_host": "ssh_hostname",
    "ansible_port": "ssh_port",
    "ansible_ssh_port": "ssh_port",
    "ansible_user": "ssh_user",
    "ansible_ssh_user": "ssh_user",
    "ansible_ssh_private_key_file": "ssh_key",
    "ansible_become": "_sudo",
}
# Variables that are not needed here, or have this value anyway.
IGNORED = (
    "ansible_python_interpreter",
    "ansible_connection",
    "ansible_become_method",
    "ansible_shell_type",
    "ansible_ssh_common_args",
)
# In an INI file these are text to Ansible too, until a task uses them.
_TRUTH = {"true": True, "yes": True, "false": False, "no": False}


@dataclass
class Host:
    """A host with all groups that contain it, and its variables."""

    groups: set[str] = field(default_factory=set)
    variables: dict[str, Any] = field(default_factory=dict)


class _Group(BaseModel):
    hosts: list[str] = []
    children: list[str] = []


class _Meta(BaseModel):
    hostvars: dict[str, dict[str, Any]] = {}


_GROUPS = TypeAdapter(dict[str, _Group])


def read(
    text: str,
    file: str,
) -> dict[str, Host]:
    """Return the hosts of an inventory, or of a listing by `ansible-inventory --list`.

    Raises SettingsError, with a line for each mistake.
    """
    listing = _listing(text)
    if listing is None:
        listing = _listing(_run(file))
    if listing is None:
        raise SettingsError(f"{file}: {PROGRAM} printed no inventory; expected {EXPECTED}")
    hosts = _hosts(listing, file)
    mistakes = [
        f"{file}: {name}: {message}"
        for name, host in hosts.items()
        for message in _unreadable(host.variables)
    ]
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return hosts


def translate(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return host data for pyinfra: connection variables translated, others with their names."""
    data = {}
    for key, value in variables.items():
        if key not in IGNORED:
            data[ACCESS.get(key, key)] = value
    sudo = data.get("_sudo")
    if isinstance(sudo, str):
        data["_sudo"] = _TRUTH.get(sudo.lower(), sudo)
    return data


def _listing(text: str) -> dict[str, Any] | None:
    """Parse a listing; None: the text is something else, such as an inventory in YAML."""
    try:
        parsed = json.loads(text)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) and "_meta" in parsed else None


def _run(file: str) -> str:
    if not os.path.exists(file):
        # Standard input, which the program cannot be given.
        raise SettingsError(f"{file}: not an inventory as JSON; expected {EXPECTED}")
    strict = {
        "ANSIBLE_INVENTORY_UNPARSED_FAILED": "1",
        "ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED": "1",
        "ANSIBLE_NOCOLOR": "1",
    }
    try:
        done = subprocess.run(
            [PROGRAM, "--inventory", file, "--list"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **strict},
            timeout=READ_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise SettingsError(
            f"{file}: {PROGRAM} is not in PATH, and only Ansible can read its inventories; install"
            f" ansible-core, or run `{PROGRAM} -i {file} --list > hosts.json` where it is"
            " installed, and import hosts.json"
        ) from None
    except subprocess.TimeoutExpired:
        raise SettingsError(
            f"{file}: {PROGRAM} did not end within {READ_SECONDS} s; does it run an inventory"
            " plugin or script that waits?"
        ) from None
    if done.returncode:
        raise SettingsError(f"{file}: {PROGRAM} failed: {_explanation(done.stderr)}")
    return done.stdout


def _explanation(stderr: str) -> str:
    """Return the causes in Ansible's output, one for each of its parsers, or the last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    causes = [line for before, line in pairwise(lines) if "caused by" in before]
    return "; ".join(dict.fromkeys(causes)) or (lines or ["it printed nothing"])[-1]


def _hosts(
    listing: Mapping[str, Any],
    file: str,
) -> dict[str, Host]:
    try:
        variables = _Meta.model_validate(listing["_meta"]).hostvars
        groups = _GROUPS.validate_python(pick(listing, listing.keys() - {"_meta"}))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SettingsError(f"{file}: {place}: {first['msg']}; expected {EXPECTED}") from None
    hosts = {name: Host(variables=own) for name, own in variables.items()}
    for name in groups:
        for host in _members(name, groups):
            hosts.setdefault(host, Host()).groups.add(name)
    return hosts


def _members(
    name: str,
    groups: Mapping[str, _Group],
) -> set[str]:
    """Return the hosts of a group and of all groups below it."""
    found: set[str] = set()
    pending, seen = [name], {name}
    while pending:
        group = groups.get(pending.pop(), _Group())
        found.update(group.hosts)
        new = [child for child in group.children if child not in seen]
        pending += new
        seen.update(new)
    return found


def is_unresolved(value: Any) -> bool:
    """Return whether a value is, or contains, a template or an encrypted one."""
    if isinstance(value, str):
        return "{{" in value or "{%" in value
    if isinstance(value, dict):
        return "__ansible_vault" in value or any(map(is_unresolved, value.values()))
    return isinstance(value, list) and any(map(is_unresolved, value))


def _unreadable(variables: Mapping[str, Any]) -> Iterator[str]:
    for key, value in variables.items():
        is_template = isinstance(value, str) and "{{" in value
        if is_template or (isinstance(value, dict) and "__ansible_vault" in value):
            yield f"{key}: {UNRESOLVED}"
        if "password" in key or key.endswith("_pass"):
            yield (
                f"{key}: a password must not be in an inventory; expected ssh keys, and sudo"
                " without a password, or with one in a local file that _sudo_password_file names"
            )
