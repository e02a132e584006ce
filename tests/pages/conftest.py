"""Fixtures of tests/chain for a real chain, a dashboard that shows it, and a browser."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.chain.conftest import (
    Chain,
    anvil_binary,
    chain,
    foreign,
    foreign_060,
    foreign_build,
    foreign_build_060,
    place,
    rpc_url,
)
from tests.pages.browser import Tab, browsing, opening, why_no_browser
from tests.pages.dashboards import Dashboard, showing, with_dashboard
from tests.pages.fleets import targets

__all__ = [
    "anvil_binary",
    "chain",
    "foreign",
    "foreign_060",
    "foreign_build",
    "foreign_build_060",
    "place",
    "rpc_url",
    "targets",
]


@pytest.fixture
def dashboard(chain: Chain, tmp_path: Path) -> Iterator[Dashboard]:
    with showing(with_dashboard(chain.settings, tmp_path / "dashboard")) as shown:
        yield shown


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Run a browser for the tests of one file.

    They are skipped without a browser; with LAB_REQUIRED=1 they fail.
    """
    if reason := why_no_browser():
        if os.environ.get("LAB_REQUIRED") == "1":
            pytest.fail(f"LAB_REQUIRED is 1, but {reason}")
        pytest.skip(reason)
    with browsing() as browser:
        yield browser


@pytest.fixture
def tab(chromium: Browser) -> Iterator[Tab]:
    """Open an empty tab, which must see no error of a script until the test ends."""
    with opening(chromium) as opened:
        yield opened
        assert opened.complaints == []
