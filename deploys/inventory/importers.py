"""`hivewright inventory tailscale|csv|ansible FILE`: make an inventory from an existing list.

The output is Python in the form of inventory/example.py, to be read, changed and kept. All mistakes
in the list are reported together, and then no inventory is printed.
"""

import argparse
import csv
import io
import json
import pprint
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from deploys.inventory import ansible_importer, validation
from deploys.inventory.addresses import EXPECTED_SSH_HOST, is_address, is_ssh_host
from deploys.inventory.host_plan import COORDINATORS, WORKERS, HostEntry
from deploys.inventory.schema import Deployment
from worker import settings
from worker.errors import SettingsError

# pyinfra's own keys of host data that a list may have: how to connect to the host.
ACCESS = {
    "ssh_hostname": str,
    "ssh_port": int,
    "ssh_user": str,
    "ssh_key": str,
    "ssh_known_hosts_file": str,
    "ssh_strict_host_key_checking": str,
    "_sudo": bool,
    "_sudo_password_file": str,
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# A list does not name the swarm that its workers join, so its absence is not a mistake of the list.
_SOME_BOOTNODE = "/ip4/192.0.2.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
HEADER = (
    '"""Made by `hivewright inventory {form} {file}`; inventory/example.py explains every key."""\n'
)


@dataclass
class Listed:
    """A host of the list; `source` is its place in the list, for messages."""

    name: str
    group: str
    data: dict[str, Any] = field(default_factory=dict)
    source: str = ""


def run(options: argparse.Namespace) -> None:
    """Print the inventory. Raises SettingsError, with a line for each mistake in the list."""
    print(inventory_text(options.form, options.file), end="")


def inventory_text(form: str, file: Path) -> str:
    """Return the inventory of a file. Raises SettingsError, with a line for each mistake."""
    source = "standard input" if str(file) == "-" else str(file)
    try:
        is_piped = str(file) == "-"
        text = sys.stdin.read() if is_piped else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(
            f"{source}: can't be read: {reason}; expected {FORMS[form].expected}"
        ) from None
    try:
        # Excel begins a file with a byte order mark.
        listed = FORMS[form].read(text.removeprefix("\ufeff"), source)
    except RecursionError:
        raise SettingsError(
            f"{source}: is nested too deep; expected {FORMS[form].expected}"
        ) from None
    if not listed:
        raise SettingsError(f"{source}: no hosts; expected {FORMS[form].expected}")
    _check(listed)
    return _write(listed, form, file)


def _check(listed: Sequence[Listed]) -> None:
    """Check the inventory as a deploy does; mistakes are reported with their place in the list."""
    lines: list[str] = []
    first: dict[str, Listed] = {}
    for one in listed:
        earlier = first.setdefault(one.name, one)
        if earlier is not one:
            lines.append(
                f"{one.source}: {one.name}: is in {earlier.source} too; expected a host once"
            )
        if not _NAME.fullmatch(one.name):
            lines.append(
                f"{one.source}: name: got {one.name!r}; expected letters, digits, dots, hyphens or"
                " underscores"
            )
        lines += _wrong_access(one)
    # Messages are assigned to hosts by name, which an invalid name would make ambiguous.
    usable = [one for one in first.values() if _NAME.fullmatch(one.name)]
    has_coordinator = any(one.group == COORDINATORS for one in usable)
    joins = {} if has_coordinator else {"swarm_bootnodes": [_SOME_BOOTNODE]}
    entries = []
    for one in usable:
        data = joins | one.data
        entries.append(HostEntry(one.name, (one.group,), data, ACCESS))
    try:
        validation.check(entries)
    except SettingsError as error:
        for line in str(error).splitlines():
            names, _, rest = line.removeprefix("inventory data of ").partition(": ")
            places = [f"{first[name].source}: {name}" for name in names.split(", ")]
            lines.append(f"{', '.join(places)}: {rest}")
    if lines:
        raise SettingsError("\n".join(lines))


def _wrong_access(one: Listed) -> Iterator[str]:
    for key, kind in ACCESS.items():
        value = one.data.get(key, kind())
        if type(value) is not kind or (key in one.data and value == ""):
            expected = f"{kind.__name__}, not empty" if value == "" else kind.__name__
            yield f"{one.source}: {one.name}: {key}: got {value!r}; expected {expected}"
        elif key == "ssh_hostname" and value and not is_ssh_host(str(value)):
            yield f"{one.source}: {one.name}: {key}: got {value!r}; {EXPECTED_SSH_HOST}"


def _write(
    listed: Sequence[Listed],
    form: str,
    file: Path,
) -> str:
    parts = [HEADER.format(form=form, file=file)]
    for group in (COORDINATORS, WORKERS):
        rows = [(one.name, one.data) for one in listed if one.group == group]
        if rows:
            parts.append(f"{group} = {pprint.pformat(rows, width=110, sort_dicts=False)}\n")
    if not any(one.group == COORDINATORS for one in listed):
        names = [one.name for one in listed]
        parts.append(
            "# The swarm that they join: name its account service, or put a host into"
            " `coordinators`.\n"
            f'all = ({names!r}, {{\n    # "chain_account_url": "http://192.0.2.99:3000",\n}})\n'
        )
    return "\n".join(parts)


def read_tailscale(
    text: str,
    file: str,
) -> list[Listed]:
    """Return the Linux machines of `tailscale status --json`, by their names in the tailnet.

    If any machine has a tag that begins with tag:hivewright, only machines with such a tag are
    returned; tag:hivewright-coordinator makes a coordinator. Otherwise the machine on which the
    list was made is left out, because it is the operator's own.
    """
    try:
        status = json.loads(text)
        own = status["Self"]
        nodes = [own, *(status.get("Peer") or {}).values()]
        machines = [node for node in nodes if node["OS"] == "linux"]
        tagged = [node for node in machines if _has_our_tag(node)]
        found = tagged or [node for node in machines if node is not own]
        if own in machines and own not in found:
            print(
                f"{file}: {_name(own)}: left out: the list was made there; the tag"
                " tag:hivewright would include it",
                file=sys.stderr,
            )
        return [_from_node(node, file) for node in found]
    except SettingsError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise SettingsError(f"{file}: {reason}; expected {FORMS['tailscale'].expected}") from None


def _has_our_tag(node: Mapping[str, Any]) -> bool:
    return any(tag.startswith("tag:hivewright") for tag in node.get("Tags") or ())


def _name(node: Mapping[str, Any]) -> str:
    name = str(node["DNSName"] or "").partition(".")[0]
    return name or str(node["HostName"] or "")


def _from_node(
    node: Mapping[str, Any],
    file: str,
) -> Listed:
    name = _name(node)
    if not name:
        raise SettingsError(f"{file}: DNSName and HostName: none; expected a machine's name")
    addresses = node.get("TailscaleIPs")
    if not isinstance(addresses, list) or not addresses or not is_address(addresses[0]):
        raise SettingsError(
            f"{file}: {name}: TailscaleIPs: got {addresses!r}; expected an address, is it"
            " logged in?"
        )
    address = str(addresses[0])
    data: dict[str, Any] = {"ssh_hostname": address}
    if "tag:hivewright-coordinator" in (node.get("Tags") or ()):
        return Listed(name, COORDINATORS, data | {"account_host": address}, f"{file}")
    return Listed(name, WORKERS, data | {"slots": "auto"}, f"{file}")


def read_csv(
    text: str,
    file: str,
) -> list[Listed]:
    """Parse a table with columns `name`, `group` (default: workers) and keys of an inventory.

    A cell is parsed as JSON if possible, otherwise it is text; empty cells are left out.
    """
    rows = _csv_rows(text, file)
    header = [cell.strip() for cell in rows[0]] if rows else []
    lines = _wrong_header(header, file)
    listed = []
    for number, row in enumerate(rows[1:], start=2):
        source = f"{file} line {number}"
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) != len(header):
            lines.append(
                f"{source}: {len(cells)} cells; expected {len(header)}, as many as there are"
                " columns"
            )
            continue
        pairs = [pair for pair in zip(header, cells, strict=True) if pair[1]]
        data = {key: _value(key, cell) for key, cell in pairs}
        name = str(data.pop("name", ""))
        group = str(data.pop("group", WORKERS))
        if not name and "name" in header:
            lines.append(f"{source}: name: none; expected the host's")
        if group not in (WORKERS, COORDINATORS):
            lines.append(f"{source}: group: got {group!r}; expected {WORKERS} or {COORDINATORS}")
        listed.append(Listed(name, group, _with_slots(data, group), source))
    if lines:
        raise SettingsError("\n".join(lines))
    return listed


def _csv_rows(
    text: str,
    file: str,
) -> list[list[str]]:
    reader = csv.reader(io.StringIO(text))
    try:
        return list(reader)
    except csv.Error as error:
        raise SettingsError(
            f"{file} line {reader.line_num}: {error}; expected {FORMS['csv'].expected}"
        ) from None


def _wrong_header(
    header: Sequence[str],
    file: str,
) -> list[str]:
    lines = []
    if "name" not in header:
        lines.append(f"{file} line 1: no column `name`; expected {FORMS['csv'].expected}")
    twice = sorted(column for column, count in Counter(header).items() if count > 1)
    return lines + [f"{file} line 1: column {column!r} is there twice" for column in twice]


def _value(key: str, cell: str) -> Any:
    if ACCESS.get(key) is str or key in ("name", "group"):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def read_ansible(
    text: str,
    file: str,
) -> list[Listed]:
    """Read an Ansible inventory, translating connection variables; our own keys are kept."""
    listed, lines = [], []
    for name, found in ansible_importer.read(text, file).items():
        group = COORDINATORS if COORDINATORS in found.groups else WORKERS
        variables = ansible_importer.translate(found.variables)
        data = {key: value for key, value in variables.items() if _is_meant_for_us(key)}
        for key, value in data.items():
            if ansible_importer.is_unresolved(value):
                lines.append(f"{file}: {name}: {key}: {ansible_importer.UNRESOLVED}")
        listed.append(Listed(name, group, _with_slots(data, group), file))
    if lines:
        raise SettingsError("\n".join(lines))
    return listed


def _is_meant_for_us(key: str) -> bool:
    """Return whether a variable is one of our keys, possibly misspelt; others are ignored."""
    known = [*Deployment.model_fields, *settings.flat_keys(), *ACCESS]
    return (
        key in known
        or key.partition("_")[0] in settings.SECTIONS
        or bool(get_close_matches(key, known, cutoff=0.8))
    )


def _with_slots(
    data: dict[str, Any],
    group: str,
) -> dict[str, Any]:
    if group == WORKERS:
        return data | {"slots": data.get("slots", "auto")}
    return data


@dataclass(frozen=True)
class Form:
    """A form of lists: its reader, given text and file name, and what is expected."""

    read: Callable[[str, str], list[Listed]]
    expected: str


FORMS = {
    "tailscale": Form(
        read_tailscale, "the output of `tailscale status --json`, with Linux machines"
    ),
    "csv": Form(read_csv, "a CSV table with a first line such as name,group,ssh_hostname,slots"),
    "ansible": Form(
        read_ansible, "an Ansible inventory, or the output of `ansible-inventory --list`"
    ),
}
