"""`hivewright account invite`, `code` and `give`: wrong input is named and changes nothing."""

import argparse
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.account.stores import open_accounts
from worker import settings
from worker.account.accounts import DATABASE_FILE, Accounts
from worker.account.releases import releases_to
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
    with pytest.raises(
        SettingsError, match=f"got {yesterday}, which is in the past; expected a future"
    ):
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


@pytest.fixture
def accounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Accounts]:
    opened = open_accounts(tmp_path, monkeypatch)
    yield opened
    opened.close()


def test_nodes_of_a_lost_invitation_are_given_to_a_person(
    host: Settings, accounts: Accounts, capsys: pytest.CaptureFixture[str]
) -> None:
    """To a new one as their account, to one with an account as nodes that they take."""
    nobodys = [accounts.create(None, 2) for _ in range(2)]
    for number, account in enumerate(nobodys):
        accounts.link(account, f"QmPeer{number}")
    ada = accounts.create("ada@example.org", 2)
    for account, email in zip(nobodys, ("cy@example.org", "Ada@example.org"), strict=True):
        account_admin.give(host, argparse.Namespace(address=account.address.lower(), email=email))
    assert accounts.by_email("cy@example.org").address == nobodys[0].address  # type: ignore[union-attr]
    assert [each.peer_id for each in releases_to(accounts, ada)] == ["QmPeer1"]
    said = capsys.readouterr().out
    assert "is the account of cy@example.org" in said
    assert f"ada@example.org has account {ada.address}" in said


def test_account_of_a_person_or_of_the_operator_is_not_given(
    host: Settings, accounts: Accounts
) -> None:
    ada = accounts.create("ada@example.org", 2)
    for address in (ada.address, accounts.operator.address, "0x0"):
        with pytest.raises(SettingsError, match=rf"ADDRESS: got {address}; expected the address"):
            account_admin.give(host, argparse.Namespace(address=address, email="eve@example.org"))
    assert accounts.by_email("eve@example.org") is None
