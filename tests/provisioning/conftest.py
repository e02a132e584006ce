"""The lab as a fixture: four real hosts, booted once for the whole test run."""

import os
from collections.abc import Iterator

import pytest

from tests.lab import machine
from tests.lab.lab import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Four hosts that answer over ssh, nothing deployed. Skipped where that can't be, unless LAB_REQUIRED is 1."""
    if reason := machine.why_no_lab():
        if os.environ.get("LAB_REQUIRED") == "1":
            pytest.fail(f"LAB_REQUIRED is 1, but {reason}")
        pytest.skip(reason)
    booted = Lab("labtest")
    try:
        booted.up(4, goes_with_this_process=True)
        yield booted
    finally:
        booted.down()
