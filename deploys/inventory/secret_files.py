"""Secrets of services: files on the operator's side, copied to root's files on a host."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from worker.errors import SettingsError
from worker.runtime.files import LINE, WORD, read_secret

# Keys whose URLs appear on command lines of hosts -> what to do instead of a password in them.
IN_URLS = {
    "release_repository": (
        "take it out, give it to git's credential helper here, and set release_source to wheelhouse"
    ),
    "torch_index": (
        "take it out, and name the index in pip's own configuration, with torch_index: pip"
    ),
    "chain_account_url": (
        "take it out: nodes prove who they are by their keys, and are let in by the enrolment token"
    ),
    "tailscale_login_server": (
        "take it out: hosts are let in by tailscale_auth_key_file, or by a person"
    ),
}
SHOWN = "has a name or password in its URL, which every user of a host could see"
# Keys that name a file with a token on this side -> the expected file.
TOKENS = {
    "hub_token_file": "a file on this side with one word, a Hugging Face token that may write",
    "model_token_file": (
        "a file on this side with one word, a Hugging Face token that may read the model"
    ),
}
# Secrets of a slot, each passed to its worker as the credential named here.
SLOT_SECRETS = {"hub_token_file": "hub.token", "tracking_wandb_key_file": "wandb.key"}
TOKENS |= {
    "tracking_wandb_key_file": "a file on this side with one word, an API key of Weights & Biases"
}
# The same for secrets of the account service, each passed to it as the credential named here.
ACCOUNT_SECRETS = {
    "account_passphrase_file": "account.passphrase",
    "account_smtp_password_file": "smtp.password",
    "account_oidc_client_secret_file": "oidc.secret",
}
TOKENS |= {
    "account_passphrase_file": (
        "a file on this side with one line, the passphrase that encrypts people's keys; keep a copy"
        " with the backups"
    ),
    "account_smtp_password_file": "a file on this side with one line, the mail server's password",
    "account_oidc_client_secret_file": "a file on this side with one word, the client secret",
}
_LINES = ("account_passphrase_file", "account_smtp_password_file")
# Patterns of keys and tokens that were written where the name of their file should be.
_KEYS = re.compile(
    r"hf_[A-Za-z0-9]{8,}|tskey-[A-Za-z0-9-]{8,}|[0-9a-f]{40}|wandb_v1_\w{8,}|.*-----BEGIN .*",
    re.DOTALL,
)
ITSELF = (
    "is a secret itself, not shown here; put it into a file that only you can read, and name that"
)


def token(key: str, file: Path) -> str:
    """Return the token in a file that `key` names. Raises SettingsError without its content."""
    if is_secret(str(file)):
        raise SettingsError(f"{ITSELF}; expected {TOKENS[key]}")
    return read_secret(file, TOKENS[key], form=LINE if key in _LINES else WORD)


def is_secret(name: str) -> bool:
    """Return whether a value that should name a file is the secret itself."""
    return _KEYS.fullmatch(name) is not None


_SHOWN_PASSWORD = re.compile(
    r"\s*(https?://[^/?#]*@|[a-z][a-z0-9+.-]*://[^\s@/]*:[^\s@/]*@)", re.IGNORECASE
)


def shows_password(url: object) -> bool:
    """Return whether a URL contains a password."""
    return isinstance(url, str) and _SHOWN_PASSWORD.match(url) is not None


def mistakes(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the mistakes in an inventory's secrets, without the secrets.

    Values of the wrong type are reported elsewhere.
    """
    for key, instead in IN_URLS.items():
        if shows_password(data.get(key)):
            yield f"{key}: {SHOWN}; {instead}"
    for key in TOKENS:
        file = data.get(key)
        if isinstance(file, str):
            try:
                token(key, Path(file))
            except SettingsError as error:
                yield f"{key}: {error}"
