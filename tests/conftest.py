"""What all tests may want, and which of a run's processes does which of them."""

import sys
from collections.abc import Iterator

import pytest
from xdist.scheduler import LoadScopeScheduling

OTHER_LABS = {
    "test_lab_debian13.py": "trixie", "test_lab_mesh.py": "bare", "test_lab_sudo.py": "own",
    "test_lab_wheelhouse.py": "bare",
}  # fmt: skip
"""File -> what it shares with others of a name: the lab that its tests run in, if that is not `lab`."""


def lab_of(file: str) -> str | None:
    return OTHER_LABS.get(file, "lab") if file.startswith("test_lab") else None


class LabsTogether(LoadScopeScheduling):  # type: ignore[misc]
    """The tests of one lab to one process, and those of one file, which may share what is slow to make."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return lab_of(file.rpartition("/")[2]) or file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LabsTogether:
    config.option.loadscopereorder = False
    return LabsTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Labs first: theirs is the longest chain of tests that wait for each other."""
    items.sort(key=lambda item: lab_of(item.path.name) is None)


@pytest.fixture
def usual_recursion_limit() -> Iterator[None]:
    """Python's own, for what is nested without end: libraries raise it beyond what the stack holds."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(limit)
