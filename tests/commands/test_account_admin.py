"""`hivewright account invite` and `account code`: wrong input is named and changes nothing."""

import argparse
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from worker import settings
from worker.account.accounts import DATABASE_FILE
from worker.commands import account_admin
from worker.errors import ResourceError, SettingsError
from worker.settings import Settings


@pytest.fixture
def host(tmp_path: Path) -> Settings:
    """Settings of an account service that has run."""
    (tmp_path / "address").write_text("http://127.0.0.1:3000\n")
    return settings.from_flat({"account_state_dir": str(tmp_path)}, "test")


@pytest.mark.parametrize(
    "until",
    [
        "",
        "soon",
        "2027-13-01",
        "2027-02-30",
        "2027/01/31",
        "31.01.2027",
        "9999-12-31",
        "10000-01-01",
    ],
)
def test_day_that_is_no_date_is_refused(host: Settings, until: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        account_admin.invite(host, argparse.Namespace(nodes=1, until=until))
    message = f"--until: got {until!r}; expected a date such as 2027-01-31"
    assert str(refusal.value) == message


def test_day_that_is_over_is_refused_and_today_is_not_over(host: Settings) -> None:
    now = datetime.now(UTC)
    yesterday = (now - timedelta(days=1)).strftime("%Y-%m-%d")
    with pytest.raises(SettingsError, match=f"got {yesterday}, which is over; expected a day to c"):
        account_admin.invite(host, argparse.Namespace(nodes=1, until=yesterday))
    today = now.strftime("%Y-%m-%d")
    with pytest.raises(ResourceError, match="expected the database of an account service"):
        account_admin.invite(host, argparse.Namespace(nodes=1, until=today))


def test_folder_without_a_service_is_named_and_stays_empty(host: Settings, tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as refusal:
        account_admin.invite(host, argparse.Namespace(nodes=1, until="2999-01-01"))
    text = str(refusal.value)
    assert text.startswith(f"{tmp_path / DATABASE_FILE}: No such file or directory; expected")
    assert not (tmp_path / DATABASE_FILE).exists()


@pytest.mark.parametrize("email", ["", "nobody", "a@", "@b", "a b@c.example", "a" * 400])
def test_address_of_something_else_is_refused(host: Settings, email: str) -> None:
    with pytest.raises(SettingsError, match=r"^EMAIL: got "):
        account_admin.code(host, argparse.Namespace(email=email))


@pytest.mark.parametrize(
    ("public_url", "address"),
    [
        (None, "http://127.0.0.1:3000"),
        ("https://swarm.example.org", "https://swarm.example.org"),
        ("https://swarm.example.org/", "https://swarm.example.org"),
    ],
)
def test_link_has_the_address_that_people_open(
    host: Settings, public_url: str | None, address: str
) -> None:
    section = host.account.model_copy(update={"public_url": public_url})
    assert account_admin._address(host.model_copy(update={"account": section})) == address
