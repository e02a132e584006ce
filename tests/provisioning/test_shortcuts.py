"""Repeated computations of pyinfra are replaced, and their results stay the same."""

import importlib.metadata
import inspect
import typing
from types import SimpleNamespace

import pytest
from pyinfra.api import arguments, connectors, facts, inventory, util

from deploys.pyinfra_ext import shortcuts

PATCHED = (
    (util, "stack"),
    (util, "getframeinfo"),
    (arguments, "all_global_arguments"),
    (facts, "all_global_arguments"),
    (connectors, "get_all_connectors"),
    (connectors, "get_execution_connectors"),
    (inventory, "get_all_connectors"),
    (inventory, "get_execution_connectors"),
)


@pytest.fixture(autouse=True)
def own_pyinfra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore pyinfra's own functions after the test."""
    for module, name in PATCHED:
        monkeypatch.setattr(module, name, getattr(module, name))


def orders() -> list[list[int]]:
    """Return the places of an operation in a deploy: before the shortcuts, and with them."""
    state = SimpleNamespace(current_deploy_filename=__file__, current_op_file_number=0)
    found = []
    for prepare in (lambda: None, shortcuts.install):
        prepare()
        found.append(util.get_operation_order_from_stack(state))
    return found


def test_operations_keep_their_order() -> None:
    before, after = orders()
    assert len(before) == 2
    assert after == before


def test_location_in_messages_is_the_same() -> None:
    found = []
    for prepare in (lambda: None, shortcuts.install):
        prepare()
        found.append(util.get_call_location(frame_offset=0))
    assert found[0].endswith("test_shortcuts.py")
    assert found[0] == found[1]


def test_no_source_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    shortcuts.install()
    monkeypatch.setattr(inspect, "getmodule", lambda *_: pytest.fail("searches all modules"))
    state = SimpleNamespace(current_deploy_filename=__file__, current_op_file_number=0)
    assert util.get_operation_order_from_stack(state)


def test_global_arguments_and_connectors_are_the_same_and_are_listed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = arguments.all_global_arguments(), connectors.get_execution_connectors()
    shortcuts.install()
    again = arguments.all_global_arguments(), inventory.get_execution_connectors()
    assert again == listed
    assert facts.all_global_arguments() == listed[0]
    assert inventory.get_all_connectors() == connectors.get_all_connectors()
    for module, name in ((typing, "get_type_hints"), (importlib.metadata, "entry_points")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("listed again"))
    monkeypatch.setattr(arguments, "get_type_hints", typing.get_type_hints)
    monkeypatch.setattr(connectors, "entry_points", importlib.metadata.entry_points)
    assert arguments.all_global_arguments() is again[0]
    assert inventory.get_execution_connectors() is again[1]
