"""A real chain, as the tests in tests/chain have it, a dashboard of it, and a browser."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

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
from tests.pages.browser import Page, browsing, why_no_browser
from tests.pages.dashboards import Dashboard, showing, with_dashboard

__all__ = [
    "anvil_binary", "chain", "foreign", "foreign_060", "foreign_build", "foreign_build_060", "place", "rpc_url",
]  # fmt: skip


@pytest.fixture
def dashboard(chain: Chain, tmp_path: Path) -> Iterator[Dashboard]:
    with showing(with_dashboard(chain.settings, tmp_path / "dashboard")) as shown:
        yield shown


@pytest.fixture
def page() -> Iterator[Page]:
    """An empty tab. Skipped where no browser can be had, unless LAB_REQUIRED is 1."""
    if reason := why_no_browser():
        if os.environ.get("LAB_REQUIRED") == "1":
            pytest.fail(f"LAB_REQUIRED is 1, but {reason}")
        pytest.skip(reason)
    with browsing() as tab:
        yield tab
