"""Inventories that pyinfra would misread silently, or fail at."""

from typing import Any

import pytest

from deploys.inventory.file_checks import forgotten

GROUP = "expected a list of hosts, or a tuple of one and of a dict of keys"
HOST = "expected a name, or a tuple of one and of a dict of keys, ('gpu-1', {'slots': 1})"


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ({"workers": {"h": {}}}, f"workers: got a dict; {GROUP}"),
        (
            {"all": (["h"], {}), "wrokers": ["g"]},
            (
                "wrokers: g is not in all; add it there (and the group is called wrokers; did you"
                " mean workers?)"
            ),
        ),
        ({"workers": None}, f"workers: got None; {GROUP}"),
        ({"workers": "h"}, f"workers: got a str; {GROUP}"),
        (
            {"workers": (("h", {}), ("g", {}))},
            f"workers: got (('h', a dict), ('g', a dict)); {GROUP}",
        ),
        ({"workers": (["h"], [1])}, f"workers: got (a list, a list); {GROUP}"),
        ({"coordinators": (["h"],)}, f"coordinators: got (a list); {GROUP}"),
        ({"all": (["h"], {}, {})}, f"all: got (a list, a dict, a dict); {GROUP}"),
        ({"VERSION": (1, 2), "workers": ["h"]}, f"VERSION: got (1, 2); {GROUP}"),
        ({"workers": ["h", None]}, f"workers: host 1: got None; {HOST}"),
        ({"workers": [("h",)]}, f"workers: host 0: got ('h'); {HOST}"),
        ({"workers": [("h", "x")]}, f"workers: host 0: got ('h', a str); {HOST}"),
        (
            {"workers": [("h", {"ssh_password": "x"}, {})]},
            f"workers: host 0: got ('h', a dict, a dict); {HOST}",
        ),
        ({"workers": [("", {})]}, f"workers: host 0: got ('', a dict); {HOST}"),
        ({"workers": [(7, {})]}, f"workers: host 0: got (7, a dict); {HOST}"),
        ({"gpus": [("h", None)]}, f"gpus: host 0: got ('h', None); {HOST}"),
        (
            {"coordinators": [("h", {"slots": 1})], "workers": [("h", {"slots": 2})]},
            "workers: h has another slots than in coordinators; expected it once",
        ),
    ],
)
def test_group_that_pyinfra_would_leave_out_or_fail_at_is_named(
    names: dict[str, Any], line: str
) -> None:
    assert list(forgotten(names)) == [line]


def test_what_pyinfra_understands_is_let_through() -> None:
    both = {
        "coordinators": [("h", {"slots": 1})],
        "workers": (["g", ("h", {"slots": 1})], {"log_level": "INFO"}),
    }
    other = {"_pair": (1, 2), "PORTS": [1, 2], "NAME": "x", "gpus": ["g"], "json": pytest}
    assert list(forgotten(both | other)) == []


def test_nan_in_two_groups_is_no_contradiction_that_hides_what_is_wrong_with_it() -> None:
    own = {"trainer_beta": float("nan")}
    assert (
        list(forgotten({"workers": [("h", own)], "all": (["h"], {}), "x": [("h", dict(own))]}))
        == []
    )
