"""Fixtures shared by all tests, and the order of the tests."""

import gc
import sys
from collections.abc import Iterator

import hypothesis
import pytest

from tests import scheduling

# What is imported stays: the garbage collector does not look through it, now or later.
gc.disable()

# No test is timed, and a run says the same as the one before it.
hypothesis.settings.register_profile(
    "hivewright", max_examples=40, deadline=None, database=None, derandomize=True
)
hypothesis.settings.load_profile("hivewright")


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> scheduling.UnitScheduling:
    return scheduling.UnitScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    scheduling.sort(items)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture
def usual_recursion_limit() -> Iterator[None]:
    """Set Python's default recursion limit, for endlessly nested input.

    Some libraries raise the limit beyond the size of the stack.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(limit)
