"""Fixtures shared by all tests."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture
def usual_recursion_limit() -> Iterator[None]:
    """Set Python's default recursion limit, for endlessly nested input.

    Some libraries raise the limit beyond the size of the stack.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(limit)
