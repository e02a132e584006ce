"""The lab as a fixture: four real hosts, booted once for the whole test run.

Each lab stays in one process of the run, and so do the tests that use it (tests/conftest.py): beside it there may be
another lab.
"""

import os
from collections.abc import Iterator

import pytest

from tests.lab import machine
from tests.lab.lab import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Four hosts that answer over ssh, nothing deployed. Skipped where that can't be, unless LAB_REQUIRED is 1."""
    yield from booted(Lab("labtest"))


@pytest.fixture(scope="module")
def own_lab() -> Iterator[Lab]:
    """The same for the tests of one file alone: on its hosts nobody has left anything."""
    yield from booted(Lab("labown"))


@pytest.fixture(scope="module")
def bare_lab() -> Iterator[Lab]:
    """The same with hosts that have nothing but Debian."""
    yield from booted(Lab("labbare", is_bare=True))


def booted(lab: Lab) -> Iterator[Lab]:
    """The lab, up for as long as the fixture lives that this comes from."""
    if reason := machine.why_no_lab():
        if os.environ.get("LAB_REQUIRED") == "1":
            pytest.fail(f"LAB_REQUIRED is 1, but {reason}")
        pytest.skip(reason)
    try:
        lab.up(4, goes_with_this_process=True)
        yield lab
    finally:
        lab.down()
