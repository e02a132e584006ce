"""What all tests may want."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture
def usual_recursion_limit() -> Iterator[None]:
    """Python's own, for what is nested without end: libraries raise it beyond what the stack
    holds."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(limit)
