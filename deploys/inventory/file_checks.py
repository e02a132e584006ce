"""Checks of an inventory file for what pyinfra would ignore or fail at.

Independent of pyinfra, whose command line changes the process that imports it.
"""

import difflib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from deploys.inventory.schema import Deployment
from worker import settings
from worker.errors import SettingsError

GROUPS = ("coordinators", "workers")
EXPECTED = "expected an inventory file, a copy of inventory/example.py"
# The beginning of a line about the inventory that stops nothing, and of one about a mistake that
# would stop a deploy.
WARNING = "warning: "
WOULD_REFUSE = f"{WARNING}a deploy would refuse "


def whole_path(name: str) -> str:
    """Return the absolute path of an inventory file. Raises SettingsError if it does not exist.

    pyinfra would take the name of a missing file for that of a host.
    """
    file = Path(name)
    if file.is_file():
        return str(file.absolute())
    if file.exists():
        raise SettingsError(f"{name}: is not a file; {EXPECTED}")
    close = difflib.get_close_matches(name, map(str, file.parent.glob("*.py")), n=1)
    raise SettingsError(
        f"{name}: no such file; {f'did you mean {close[0]}?' if close else EXPECTED}"
    )


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
    if wrong := [line for name, value in groups.items() for line in _misshapen(name, value)]:
        yield from wrong
        return
    everybody = _hosts_of(names["all"]) if "all" in names else None
    for group in GROUPS:
        for host, count in Counter(name for name, _ in _hosts_of(names.get(group, []))).items():
            if count > 1:
                yield f"{group}: {host} is there {count} times; expected each host once"
    if everybody is not None:
        yield from _left_out(groups, {name for name, _ in everybody})
    yield from _contradictions(groups)


def _left_out(groups: Mapping[str, Any], everybody: Collection[str]) -> Iterator[str]:
    """Yield hosts of any group that are not in `all`, which pyinfra would ignore."""
    for group, value in groups.items():
        close = [] if group in ("all", *GROUPS) else difflib.get_close_matches(group, GROUPS, n=1)
        hint = f" (and the group is called {group}; did you mean {close[0]}?)" if close else ""
        for host in dict.fromkeys(name for name, _ in _hosts_of(value)):
            if host not in everybody:
                yield f"{group}: {host} is not in all; add it there{hint}"


def _is_group(name: str, value: Any) -> bool:
    """Return whether a name is a group to pyinfra: a known one, a list of hosts, or a tuple."""
    if name in ("all", *GROUPS):
        return True
    is_list = isinstance(value, list) and all(isinstance(item, str | tuple) for item in value)
    return not name.startswith("_") and (is_list or isinstance(value, tuple))


def _misshapen(name: str, group: Any) -> Iterator[str]:
    """Yield why a group is invalid; pyinfra would skip it with a warning, or fail."""
    is_pair = isinstance(group, tuple) and len(group) == 2
    hosts, data = group if is_pair else (group, {})
    if not isinstance(hosts, list) or not isinstance(data, dict):
        yield (
            f"{name}: got {_kind(group)}; expected a list of hosts, or a tuple of one and of a dict"
            " of keys"
        )
        return
    for number, host in enumerate(hosts):
        host_name, own = host if isinstance(host, tuple) and len(host) == 2 else (host, {})
        if not isinstance(host_name, str) or not host_name.strip() or not isinstance(own, dict):
            yield (
                f"{name}: host {number}: got {_kind(host)}; expected a name, or a tuple of one and"
                " of a dict of keys, ('gpu-1', {'slots': 1})"
            )


def _hosts_of(group: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return name and own data of each host of a valid group."""
    listed = group[0] if isinstance(group, tuple) else group
    return [host if isinstance(host, tuple) else (host, {}) for host in listed]


def _contradictions(groups: Mapping[str, Any]) -> Iterator[str]:
    """Yield keys that a host has in two groups with different values; pyinfra takes the last."""
    said: dict[tuple[str, Any], tuple[str, Any]] = {}
    for group, value in groups.items():
        for host, data in _hosts_of(value):
            for key in data:
                first, known = said.setdefault((host, key), (group, data[key]))
                if not _is_same(known, data[key]):
                    # Without the values: they may be passwords.
                    yield f"{group}: {host} has another {key} than in {first}; expected it once"


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two values are equal; nan, which is refused elsewhere, equals itself."""
    return one is other or one == other or repr(one) == repr(other)


def _kind(value: Any) -> str:
    """Describe a value without possible secrets: host names may be shown, data may not."""
    if isinstance(value, tuple):
        first = [repr(value[0]) if isinstance(value[0], str) else _kind(value[0])] if value else []
        return f"({', '.join([*first, *map(_kind, value[1:])])})"
    return (
        repr(value)
        if value is None or isinstance(value, int | float)
        else f"a {type(value).__name__}"
    )
