"""Hosts and variables of an Ansible inventory: the static forms, INI and YAML. Nothing is executed.

Left out on purpose: inventory plugins and scripts, templates ({{ }}), vault. `ansible-inventory
--list --yaml` resolves all of these into a file that can be read here. What is encrypted or a
template is refused by name.
"""

import ast
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from worker.errors import SettingsError

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
# Of Ansible alone, or the default here: they say nothing of the host.
IGNORED = (
    "ansible_python_interpreter",
    "ansible_connection",
    "ansible_become_method",
    "ansible_shell_type",
    "ansible_ssh_common_args",
)
_MAX_HOSTS = 10_000
_RANGE = re.compile(r"\[(\w{1,12}):(\w{1,12})(?::(\d{1,6}))?\]")


@dataclass
class Host:
    """A host with its groups, and its variables, those nearest to it winning."""

    groups: set[str] = field(default_factory=set)
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Group:
    hosts: dict[str, dict[str, Any]] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    children: list[str] = field(default_factory=list)


def read(text: str, file: str) -> dict[str, Host]:
    """Return the hosts of an inventory. Raises SettingsError, with a line for each mistake."""
    mistakes: list[str] = []
    groups = (_read_yaml if _is_yaml(text, file) else _read_ini)(text, file, mistakes)
    for name, group in groups.items():
        mistakes += [
            f"{file}: group {name}: children: no group {child!r}"
            for child in group.children
            if child not in groups
        ]
    found: dict[str, Host] = {}
    if not mistakes:
        reached: set[str] = set()
        _gather("all", groups, (), {}, found, reached)
        mistakes += [
            f"{file}: group {name}: is in itself" for name in groups if name not in reached
        ]
        for group in groups.values():
            for host_name, variables in group.hosts.items():
                found.setdefault(host_name, Host()).variables.update(variables)
        mistakes += [
            f"{file}: {name}: {message}"
            for name in found
            for message in _unreadable(found[name].variables)
        ]
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return found


def _is_yaml(text: str, file: str) -> bool:
    """Return whether Ansible reads a file as YAML: by its name, or by its first line."""
    if file.endswith((".yml", ".yaml", ".json")):
        return True
    lines = [
        line.strip() for line in text.splitlines() if line.strip() and line.strip()[0] not in "#;"
    ]
    return bool(lines) and (lines[0] == "---" or lines[0].endswith(":") or lines[0][0] == "{")


def translate(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Host data of pyinfra. Other variables keep their names."""
    return {ACCESS.get(key, key): value for key, value in variables.items() if key not in IGNORED}


def _gather(
    name: str,
    groups: Mapping[str, _Group],
    above: tuple[str, ...],
    variables: Mapping[str, Any],
    found: dict[str, Host],
    reached: set[str],
) -> None:
    """Give the hosts of a group and its children its variables; nearer groups take precedence."""
    reached.add(name)
    group = groups[name]
    variables = {**variables, **group.variables}
    for host in group.hosts:
        entry = found.setdefault(host, Host())
        entry.groups |= {*above, name}
        entry.variables.update(variables)
    for child in sorted(group.children):
        if child not in above:
            _gather(child, groups, (*above, name), variables, found, reached)


def _read_ini(text: str, file: str, mistakes: list[str]) -> dict[str, _Group]:
    groups: dict[str, _Group] = {"all": _Group()}
    name, kind = "ungrouped", ""
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line[0] in "#;":
            continue
        if header := re.fullmatch(r"\[([^\]:]+)(?::(\w+))?\]\s*([#;].*)?", line):
            name, kind = header[1], header[2] or ""
            groups.setdefault(name, _Group())
            if kind not in ("", "vars", "children"):
                mistakes.append(
                    f"{file} line {number}: [{name}:{kind}]; expected [{name}], :vars or :children"
                )
            continue
        if re.match(r"\[(?!\w+:\w+)", line):
            mistakes.append(
                f"{file} line {number}: got {line!r}; expected [GROUP], [GROUP:vars] or"
                " [GROUP:children]"
            )
            continue
        group = groups.setdefault(name, _Group())
        if kind == "children":
            group.children.append(line.split()[0])
            continue
        try:
            words = [line] if kind == "vars" else shlex.split(line, comments=True)
        except ValueError as error:
            mistakes.append(f"{file} line {number}: {error}; expected HOST KEY=VALUE ...")
            continue
        pairs = words if kind == "vars" else words[1:]
        if bad := [pair for pair in pairs if "=" not in pair]:
            mistakes.append(f"{file} line {number}: got {bad[0]!r}; expected KEY=VALUE")
            continue
        variables = {
            key.strip(): _literal(value.strip())
            for key, value in (pair.split("=", 1) for pair in pairs)
        }
        if kind == "vars":
            group.variables.update(variables)
        else:
            for host in _expand(words[0]):
                group.hosts.setdefault(host, {}).update(variables)
    _adopt_by_all(groups)
    return groups


def _read_yaml(text: str, file: str, mistakes: list[str]) -> dict[str, _Group]:
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        mistakes.append(
            f"{file}{where}: not YAML: {getattr(error, 'problem', None) or 'unreadable'}"
        )
        return {}
    groups: dict[str, _Group] = {"all": _Group()}

    if not isinstance(raw, dict):
        mistakes.append(f"{file}: got {_short(raw)}; expected groups with hosts, vars and children")
        return {}
    for name, body in raw.items():
        _read_group(str(name), body, groups, file, mistakes)
    _adopt_by_all(groups)
    return groups


def _read_group(
    name: str, body: Any, groups: dict[str, _Group], file: str, mistakes: list[str]
) -> None:
    """Add a group of a YAML inventory, and those inside it, to `groups`."""
    group = groups.setdefault(name, _Group())
    if body is None:
        return
    if reason := _wrong_group(body):
        mistakes.append(f"{file}: group {name}: {reason}")
        return
    for pattern, variables in (body.get("hosts") or {}).items():
        for host in _expand(str(pattern)):
            group.hosts.setdefault(host, {}).update(variables or {})
    group.variables.update(body.get("vars") or {})
    for child, inner in (body.get("children") or {}).items():
        group.children.append(str(child))
        _read_group(str(child), inner, groups, file, mistakes)


def _wrong_group(body: Any) -> str | None:
    """Return what is wrong with the body of a group in YAML; None: nothing."""
    if not isinstance(body, dict) or not set(body) <= {"hosts", "vars", "children"}:
        return f"got {_short(body)}; expected hosts, vars and children"
    parts = {part: body.get(part) or {} for part in ("hosts", "vars", "children")}
    for part, value in parts.items():
        if not isinstance(value, dict):
            return f"{part}: got {_short(value)}; expected a mapping"
    for owner, variables in ({"vars": parts["vars"]} | parts["hosts"]).items():
        if not _is_mapping_of_names(variables or {}):
            return f"{owner}: got {_short(variables)}; expected a mapping of names"
    return None


def _is_mapping_of_names(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _adopt_by_all(groups: dict[str, _Group]) -> None:
    """Every group that is in no other one is in `all`."""
    children = {child for group in groups.values() for child in group.children}
    groups["all"].children += [name for name in groups if name != "all" and name not in children]


def _literal(text: str) -> Any:
    """Parse a value of an INI file as Ansible does: a Python literal, or text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "yes": True, "false": False, "no": False}.get(text.lower(), text)


def _expand(pattern: str) -> Iterator[str]:
    """gpu[01:12] is gpu01 to gpu12. Raises SettingsError for ranges of no host, or of too many."""
    count = math.prod(len(_range(found)) for found in _RANGE.finditer(pattern))
    if not 1 <= count <= _MAX_HOSTS:
        raise SettingsError(f"{pattern}: {count:,} hosts; expected 1 to {_MAX_HOSTS:,} in one line")
    return _expanded(pattern)


def _expanded(pattern: str) -> Iterator[str]:
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    width = len(found[1]) if _is_decimal(found) else 0
    for middle in (str(n).zfill(width) if width else chr(n) for n in _range(found)):
        yield from _expanded(pattern[: found.start()] + middle + pattern[found.end() :])


def _is_decimal(found: re.Match[str]) -> bool:
    return found[1].isdecimal() and found[2].isdecimal()


def _range(found: re.Match[str]) -> range:
    first, last, step = found[1], found[2], int(found[3] or 1) or 1
    return (
        range(int(first), int(last) + 1, step)
        if _is_decimal(found)
        else range(ord(first[0]), ord(last[0]) + 1, step)
    )


def _unreadable(variables: Mapping[str, Any]) -> Iterator[str]:
    for key, value in variables.items():
        if isinstance(value, str) and ("{{" in value or value.startswith("$ANSIBLE_VAULT")):
            yield (
                f"{key}: a template, or encrypted; expected a plain value (`ansible-inventory"
                " --list --yaml`)"
            )
        if "password" in key or key.endswith("_pass"):
            yield (
                f"{key}: a password has no place in an inventory; expected ssh keys, and sudo"
                " without a password, or with one in a file on this side that _sudo_password_file"
                " names"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
