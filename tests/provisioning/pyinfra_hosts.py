"""pyinfra hosts without a connection, and the current host of deploys, with facts of our choice."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from pyinfra.api.host import Host
from pyinfra.api.inventory import Inventory
from pyinfra.context import ctx_host


def host(name: str = "gpu-1", /, **data: Any) -> Host:
    """Return a host as pyinfra makes it from an inventory, not connected to."""
    inventory = Inventory(([(name, data)], {}), workers=([name], {}))
    found = inventory.get_host(name)
    assert found is not None
    return found


@contextmanager
def current_host(facts: Mapping[type, Any], name: str = "gpu-1") -> Iterator[list[str]]:
    """Make a host with these facts the current one; a fact that is not there is a KeyError.

    Yields the reasons of its no-ops.
    """
    noops: list[str] = []

    def get_fact(fact: type, **arguments: Any) -> Any:
        answer = facts[fact]
        return answer(**arguments) if callable(answer) else answer

    stand_in = SimpleNamespace(name=name, get_fact=get_fact, noop=noops.append)
    with ctx_host.use(stand_in):
        yield noops
