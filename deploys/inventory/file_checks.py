"""Check an inventory file for mistakes that pyinfra would ignore or fail at.

It does not import pyinfra, whose command line changes the process that imports it.
"""

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploys.inventory.schema import Deployment
from worker import settings
from worker.errors import SettingsError

GROUPS = ("coordinators", "workers")
# Name and own data of each host, by group.
Groups = Mapping[str, Sequence[tuple[str, dict[str, Any]]]]
EXPECTED = "expected an inventory file, a copy of inventory/example.py"
# Prefixes of lines about the inventory: of a warning, and of a mistake that would stop a deploy.
WARNING = "warning: "
WOULD_REFUSE = f"{WARNING}a deploy would refuse "


def whole_path(name: str) -> str:
    """Return the absolute path of an inventory file. Raises SettingsError if it does not exist.

    pyinfra would treat the name of a missing file as the name of a host.
    """
    file = Path(name)
    if file.is_file():
        return str(file.absolute())
    if file.exists():
        raise SettingsError(f"{name}: is not a file; {EXPECTED}")
    others = [str(each) for each in file.parent.glob("*.py")]
    close = difflib.get_close_matches(name, others, n=1)
    hint = f"did you mean {close[0]}?" if close else EXPECTED
    raise SettingsError(f"{name}: no such file; {hint}")


def forgotten(names: Mapping[str, Any]) -> Iterator[str]:
    """Yield the mistakes in an inventory's module that pyinfra would ignore or merge silently."""
    keys = {*Deployment.model_fields, *settings.flat_keys()}
    for name in names:
        if name in keys:
            yield (
                f"{name}: is not in the data of any host and has no effect; put it into the data of"
                " a host, or of all"
            )
    groups = {name: value for name, value in names.items() if _is_group(name, value)}
    wrong: list[str] = []
    for name, value in groups.items():
        wrong += _misshapen(name, value)
    if wrong:
        yield from wrong
        return
    hosts = {name: list(_hosts_of(value)) for name, value in groups.items()}
    for group in GROUPS:
        for host, count in Counter(name for name, _ in hosts.get(group, ())).items():
            if count > 1:
                yield f"{group}: {host} is there {count} times; expected each host once"
    if "all" in hosts:
        yield from _left_out(hosts)
    yield from _contradictions(hosts)


def _left_out(groups: Groups) -> Iterator[str]:
    """Yield hosts of any group that are not in `all`, which pyinfra would ignore."""
    everybody = {name for name, _ in groups["all"]}
    for group, hosts in groups.items():
        hint = ""
        if group not in ("all", *GROUPS):
            close = difflib.get_close_matches(group, GROUPS, n=1)
            if close:
                hint = f" (and the group is called {group}; did you mean {close[0]}?)"
        for host in dict.fromkeys(name for name, _ in hosts):
            if host not in everybody:
                yield f"{group}: {host} is not in all; add it there{hint}"


def _is_group(name: str, value: Any) -> bool:
    """Return whether a name is a group to pyinfra: a known one, a list of hosts, or a tuple."""
    if name in ("all", *GROUPS):
        return True
    if name.startswith("_"):
        return False
    if isinstance(value, list):
        return all(isinstance(item, str | tuple) for item in value)
    return isinstance(value, tuple)


def _misshapen(
    name: str,
    group: Any,
) -> Iterator[str]:
    """Yield why a group is invalid; pyinfra would skip it with a warning, or fail."""
    hosts, data = _pair(group)
    if not isinstance(hosts, list) or not isinstance(data, dict):
        yield (
            f"{name}: got {_kind(group)}; expected a list of hosts, or a tuple of one and of a dict"
            " of keys"
        )
        return
    for number, host in enumerate(hosts):
        host_name, own = _pair(host)
        has_name = isinstance(host_name, str) and host_name.strip()
        if not has_name or not isinstance(own, dict):
            yield (
                f"{name}: host {number}: got {_kind(host)}; expected a name, or a tuple of one and"
                " of a dict of keys, ('gpu-1', {'slots': 1})"
            )


def _pair(value: Any) -> tuple[Any, Any]:
    """Return a value and its data, which it may have in a tuple with it."""
    if isinstance(value, tuple) and len(value) == 2:
        return value
    return value, {}


def _hosts_of(group: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and own data of each host of a valid group."""
    hosts, _ = _pair(group)
    for host in hosts:
        yield _pair(host)


def _contradictions(groups: Groups) -> Iterator[str]:
    """Yield keys that a host has in two groups with different values; pyinfra takes the last."""
    seen: dict[tuple[str, str], tuple[str, Any]] = {}
    for group, hosts in groups.items():
        for host, data in hosts:
            for key, value in data.items():
                first, known = seen.setdefault((host, key), (group, value))
                # Compared as text too, because nan (refused elsewhere) does not equal itself.
                if known != value and repr(known) != repr(value):
                    # Without the values: they may be passwords.
                    yield f"{group}: {host} has another {key} than in {first}; expected it once"


def _kind(value: Any) -> str:
    """Describe a value without possible secrets: host names may be shown, data may not."""
    if isinstance(value, tuple):
        parts = [_kind(each) for each in value]
        if value and isinstance(value[0], str):
            parts[0] = repr(value[0])
        return f"({', '.join(parts)})"
    if value is None or isinstance(value, int | float):
        return repr(value)
    return f"a {type(value).__name__}"
