"""The account's key and the secret behind nodes' tokens."""

import logging
import stat
from pathlib import Path

import pytest

from worker.account.vault import KEY_FILE, SECRET_FILE, Tokens, load_account
from worker.errors import IdentityError, SecretError

PEER = "12D3KooWpeer"


def test_first_start_makes_a_key_that_only_its_user_can_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    account = load_account(tmp_path)
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    assert load_account(tmp_path).address == account.address
    assert (tmp_path / KEY_FILE).read_text().strip().removeprefix("0x") not in caplog.text


def test_lost_key_of_a_used_account_is_not_replaced(tmp_path: Path) -> None:
    load_account(tmp_path)
    Tokens(tmp_path)
    (tmp_path / KEY_FILE).unlink()
    with pytest.raises(IdentityError, match="missing, though this account has been used; restore"):
        load_account(tmp_path)
    assert not (tmp_path / KEY_FILE).exists()


def test_key_of_zero_is_no_account(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_text("0x" + "0" * 64)
    with pytest.raises(IdentityError, match="no key of an account; restore it from its backup"):
        load_account(tmp_path)


def test_text_in_the_place_of_a_key_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_text("a passphrase that is secret")
    with pytest.raises(SecretError) as caught:
        load_account(tmp_path)
    assert "passphrase" not in str(caught.value)


def test_token_is_valid_for_its_peer_also_after_a_restart(tmp_path: Path) -> None:
    token = Tokens(tmp_path).issue(PEER)
    assert Tokens(tmp_path).issue(PEER) == token
    assert Tokens(tmp_path).peer_of(token) == PEER


@pytest.mark.parametrize(
    "forge",
    [
        lambda token: "",
        lambda token: PEER,
        lambda token: token[:-1],
        lambda token: token + "0",
        lambda token: token.upper(),
        lambda token: token.replace(PEER, "12D3KooWother"),
        lambda token: token.replace(PEER, f"{PEER}.x"),
        lambda token: token.replace(PEER, "12D3KooW\u00fc"),
        lambda token: token[:-1] + "\u00fc",
    ],
)
def test_altered_token_is_valid_for_nobody(tmp_path: Path, forge: object) -> None:
    tokens = Tokens(tmp_path)
    assert tokens.peer_of(forge(tokens.issue(PEER))) is None


def test_tokens_of_another_service_are_not_ours(tmp_path: Path) -> None:
    token = Tokens(tmp_path / "other").issue(PEER)
    assert Tokens(tmp_path / "own").peer_of(token) is None
    assert stat.S_IMODE((tmp_path / "own" / SECRET_FILE).stat().st_mode) == 0o600
