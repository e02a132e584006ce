"""Check that a new version of a contract finds in storage what an older one left there."""

from typing import Any

_GAP = "__gap"
"""Room that a version leaves for later ones: the only variable that may go."""


def breaks(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what the layout `new` (an artifact's storage_layout) would read from the wrong place;
    empty if it fits `old`.

    Every variable of `old` must be where it was, with its name and type, and so must every member
    of every struct; a struct must keep its size, for it may stand in an array. New variables take
    what was gap, or come last.
    """
    found = _moved(_without_gap(old["variables"]), new["variables"], "variable")
    for name, struct in old["structs"].items():
        shown = f"struct {name.removeprefix('t_struct(').partition(')')[0]}"
        if name not in new["structs"]:
            found.append(f"{shown} is gone")
            continue
        now = new["structs"][name]
        found += _moved(struct["members"], now["members"], f"{shown}: member")
        if struct["bytes"] != now["bytes"]:
            found.append(f"{shown} took {struct['bytes']} bytes, now {now['bytes']}")
    return found


def _without_gap(variables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [variable for variable in variables if variable["label"] != _GAP]


def _moved(old: list[dict[str, Any]], new: list[dict[str, Any]], what: str) -> list[str]:
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
