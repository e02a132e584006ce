"""Secrets of the account service: the account's key, and the secret behind nodes' tokens.

A token is "PEER_ID.HMAC". It is valid only for its own peer id, and nothing needs to be stored to
verify it.
"""

import hashlib
import hmac
import logging
import secrets
from pathlib import Path

from eth_account import Account
from eth_account.signers.local import LocalAccount

from worker.errors import IdentityError
from worker.runtime.files import HEX_KEY, read_secret, write_whole

log = logging.getLogger(__name__)

KEY_FILE = "account.key"
SECRET_FILE = "token.secret"  # noqa: S105 - a file name


def load_account(folder: Path) -> LocalAccount:
    """Return the account of `account.key` in `folder`, which the first start creates.

    Raises SecretError if the key is not readable, IdentityError if it is invalid, or missing though
    the service has run before.
    """
    file = folder / KEY_FILE
    if not file.exists():
        if (folder / SECRET_FILE).exists():
            raise IdentityError(
                f"{file}: missing, though this account has been used; restore it from its backup,"
                f" or remove {SECRET_FILE} next to it to start with a new account"
            )
        write_whole(file, f"0x{secrets.token_hex(32)}\n", mode=0o600)
        log.info("account key made file=%s", file)
    key = _read_hex(file)
    try:
        account: LocalAccount = Account.from_key(key)
    except ValueError:
        raise IdentityError(f"{file}: no key of an account; restore it from its backup") from None
    return account


class Tokens:
    """Issue and verify nodes' tokens with the secret in `folder`, created on the first start."""

    def __init__(self, folder: Path) -> None:
        file = folder / SECRET_FILE
        if not file.exists():
            write_whole(file, secrets.token_hex(32) + "\n", mode=0o600)
        self._secret = bytes.fromhex(_read_hex(file))

    def issue(self, peer_id: str) -> str:
        """Return the peer's token, always the same."""
        return f"{peer_id}.{hmac.new(self._secret, peer_id.encode(), hashlib.sha256).hexdigest()}"

    def peer_of(self, token: str) -> str | None:
        """Return the peer of a valid token; None if we did not issue the token."""
        peer_id = token.rpartition(".")[0]
        is_ours = hmac.compare_digest(self.issue(peer_id).encode(), token.encode())
        return peer_id if is_ours else None


def _read_hex(file: Path) -> str:
    """Return 64 hexadecimal digits, without 0x."""
    expected = "64 hexadecimal digits; restore it from its backup"
    return read_secret(file, expected, form=HEX_KEY).removeprefix("0x")
