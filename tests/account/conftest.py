"""Fixtures of tests/chain for a real chain, and an account service where people have accounts."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker import settings
from worker.account.accounts import Accounts

# As pytest does for the tests next to them, which import each other by their bare names.
sys.path.insert(0, str(Path(__file__).parents[1] / "chain"))

from account_service import Running, serving

from tests.account.hosting import hosted
from tests.account.stores import open_accounts
from tests.chain.conftest import Chain, anvil_binary, chain, rpc_url
from tests.pages.conftest import chromium, tab

__all__ = ["anvil_binary", "chain", "chromium", "rpc_url", "tab"]


@pytest.fixture
def accounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Accounts]:
    """An account service's database, without a service."""
    opened = open_accounts(tmp_path, monkeypatch)
    yield opened
    opened.close()


@pytest.fixture
def host(chain: Chain, tmp_path: Path) -> settings.Settings:
    return hosted(chain.settings, tmp_path / "account")


@pytest.fixture
def service(host: settings.Settings) -> Iterator[Running]:
    with serving(host) as running:
        yield running
