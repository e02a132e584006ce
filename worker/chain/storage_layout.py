"""Verify that a new version of a contract keeps the storage layout of an older one."""

from typing import Any

_GAP = "__gap"
"""Reserved slots for later versions: the only variable that may disappear."""


def breaks(
    old: dict[str, Any],
    new: dict[str, Any],
) -> list[str]:
    """Return the incompatibilities of layout `new` with `old`; empty if there are none.

    Both are an artifact's storage_layout. Every variable of `old` must keep its place, name and
    type, and so must every member of every struct; a struct must keep its size, because it may be
    in an array. New variables replace gap, or come last.
    """
    variables = [variable for variable in old["variables"] if variable["label"] != _GAP]
    found = _moved(variables, new["variables"], "variable")
    for name, struct in old["structs"].items():
        bare_name, _, _ = name.removeprefix("t_struct(").partition(")")
        shown = f"struct {bare_name}"
        if name not in new["structs"]:
            found.append(f"{shown} is gone")
            continue
        now = new["structs"][name]
        found += _moved(struct["members"], now["members"], f"{shown}: member")
        size, new_size = struct["bytes"], now["bytes"]
        if size != new_size:
            found.append(f"{shown} took {size} bytes, now {new_size}")
    return found


def _moved(
    old: list[dict[str, Any]],
    new: list[dict[str, Any]],
    what: str,
) -> list[str]:
    places = {variable["label"]: variable for variable in new}
    found = []
    for variable in old:
        label = variable["label"]
        now = places.get(label)
        if now is None:
            found.append(f"{what} {label} is gone")
        elif now != variable:
            found.append(f"{what} {label} was {_place(variable)}, now {_place(now)}")
    return found


def _place(variable: dict[str, Any]) -> str:
    return f"{variable['type']} at slot {variable['slot']}, byte {variable['offset']}"
