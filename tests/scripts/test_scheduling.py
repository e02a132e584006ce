"""The order of the tests in a run, and which of them share a process."""

from types import SimpleNamespace
from typing import Any

from tests import scheduling


def item(nodeid: str, is_slow: bool = False) -> Any:
    return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: is_slow or None)


def test_names_of_the_longest_units_are_files_and_labs_that_exist() -> None:
    labs = {"lab", *scheduling.OTHER_LABS.values()}
    for unit in scheduling.LONGEST_FIRST:
        assert unit in labs or (scheduling.ROOT / unit).is_file(), unit
    for file in scheduling.OTHER_LABS:
        assert (scheduling.ROOT / "tests/provisioning" / file).is_file(), file


def test_files_of_one_lab_are_one_unit_and_other_files_are_each_their_own() -> None:
    folder = "tests/provisioning"
    assert scheduling.unit_of(f"{folder}/test_lab_deploy.py::test_a[x::y]") == "lab"
    assert scheduling.unit_of(f"{folder}/test_lab_sudo.py::test_a") == "own"
    assert scheduling.unit_of(f"{folder}/test_links.py::test_a") == f"{folder}/test_links.py"


def test_longest_units_start_first_then_slow_ones_then_those_with_the_most_tests() -> None:
    names = [
        "tests/unit/test_short.py::test_a",
        "tests/unit/test_long.py::test_b",
        "tests/unit/test_long.py::test_a",
        "tests/unit/test_slow.py::test_a",
        "tests/e2e/test_demo.py::test_a",
        "tests/provisioning/test_lab_sudo.py::test_a",
        "tests/provisioning/test_lab.py::test_a",
        "tests/provisioning/test_lab_account.py::test_a",
    ]
    items = [item(name, is_slow="test_slow" in name) for name in names]
    scheduling.sort(items)
    assert [names.index(each.nodeid) for each in items] == [6, 5, 7, 4, 3, 1, 2, 0]
