"""Secrets of services: files on the operator's side that go to root's files on a host, and from there by systemd."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from worker.errors import SettingsError

HUB_TOKEN = "hub.token"  # noqa: S105 - a file name
# Keys whose URLs are on command lines of hosts -> what to do instead of writing a password into one.
IN_URLS = {
    "release_repository": "take it out, give it to git's credential helper here, and set release_source to wheelhouse",
    "torch_index": "take it out, and name the index in pip's own configuration, with torch_index: pip",
}
EXPECTED = "a file on this side with one word, a Hugging Face token that may write"


def hub_token(file: Path) -> str:
    """The token in a file. Raises SettingsError with the reason, never with what is in the file."""
    try:
        words = file.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise SettingsError(f"{file}: {reason}; expected {EXPECTED}") from None
    if len(words) != 1:
        raise SettingsError(f"{file}: {len(words)} words; expected {EXPECTED}")
    return words[0]


def shows_password(url: object) -> bool:
    """Whether a URL has in it what only its owner should know."""
    parts = urlsplit(url) if isinstance(url, str) and url.startswith(("http://", "https://")) else None
    return parts is not None and "@" in parts.netloc


def mistakes(data: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with an inventory's secrets, without the secrets. What is no text the settings' check names."""
    for key, instead in IN_URLS.items():
        if shows_password(data.get(key)):
            yield f"{key}: has a name or password in its URL, which every user of a host could see; {instead}"
    file = data.get("hub_token_file")
    if isinstance(file, str):
        try:
            hub_token(Path(file))
        except SettingsError as error:
            yield f"hub_token_file: {error}"
