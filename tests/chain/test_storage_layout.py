"""Storage layouts: what an upgrade may change, and what it may not."""

import copy
from typing import Any

import pytest

from worker.chain.contract import artifact
from worker.chain.storage_layout import breaks
from worker.chain.upgrade import releases


def variable(label: str, slot: int, kind: str = "t_uint256", offset: int = 0) -> dict[str, Any]:
    return {"label": label, "slot": str(slot), "offset": offset, "type": kind}


OLD: dict[str, Any] = {
    "variables": [variable("round", 0), variable("peers", 1), variable("__gap", 2, "t_gap48")],
    "structs": {"t_struct(Peer)1_storage": {"bytes": "64", "members": [variable("id", 0)]}},
}


def test_same_layout_and_variables_in_the_gap_are_compatible() -> None:
    assert breaks(OLD, OLD) == []
    new = copy.deepcopy(OLD)
    new["variables"][2:] = [variable("stages", 2), variable("__gap", 3, "t_gap47")]
    assert breaks(OLD, new) == []


@pytest.mark.parametrize(
    ("index", "changed", "fault"),
    [
        (1, None, "variable peers is gone"),
        (1, variable("peers", 2), "variable peers was t_uint256 at slot 1, byte 0, now"),
        (0, variable("round", 0, "t_uint128"), "now t_uint128 at slot 0, byte 0"),
        (0, variable("round", 0, offset=16), "now t_uint256 at slot 0, byte 16"),
    ],
)
def test_moved_variable_is_named(index: int, changed: dict[str, Any] | None, fault: str) -> None:
    new = copy.deepcopy(OLD)
    new["variables"][index : index + 1] = [] if changed is None else [changed]
    (found,) = breaks(OLD, new)
    assert fault in found


def test_struct_keeps_its_members_and_its_size() -> None:
    new = copy.deepcopy(OLD)
    struct = new["structs"]["t_struct(Peer)1_storage"]
    struct["bytes"], struct["members"] = "96", [variable("id", 1)]
    assert breaks(OLD, new) == [
        "struct Peer: member id was t_uint256 at slot 0, byte 0, now t_uint256 at slot 1, byte 0",
        "struct Peer took 64 bytes, now 96",
    ]
    assert breaks(OLD, {**OLD, "structs": {}}) == ["struct Peer is gone"]


def test_our_contract_is_compatible_with_every_release() -> None:
    ours = artifact("SwarmCoordinator")["storage_layout"]
    assert releases()
    for release in releases():
        assert breaks(release["storage_layout"], ours) == [], release["version"]
