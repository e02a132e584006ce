"""Decisions made once, on the operator's side, before any host is touched: commit and token."""

import fcntl
import hashlib
import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from deploys import progress
from deploys.paths import ENROLMENT_TOKEN
from worker.errors import SettingsError
from worker.runtime.files import read_secret, write_whole

RESOLVE_SECONDS = 60
TOKEN_FILE = "enrolment.token"  # noqa: S105 - a file name
EXPECTED_TOKEN = f"one word; the account service's host has it in {ENROLMENT_TOKEN}"
# SHA-256 of the files of tokens that were replaced by a rotation.
REPLACED_FILE = "enrolment.replaced"
FETCH = "`hivewright fleet fetch-token INVENTORY` fetches the fleet's token"
# Public keys of the hosts of a WireGuard mesh, by host.
PUBLIC_KEYS_FILE = "wireguard.json"
EXPECTED_RECORD = (
    "expected public keys by host; take a copy of it, or remove it and deploy the whole fleet"
)


def origin(checkout: Path, source: str) -> str:
    """Return the URL of the checkout's `origin`. Raises SettingsError if it has none."""
    url = _git(
        "-c", "safe.directory=*", "-C", str(checkout), "config", "--get", "remote.origin.url"
    ).stdout.strip()
    if not url:
        raise SettingsError(
            f"{source}: release_repository: not set, and {checkout} has no origin; expected the git"
            " URL that the hosts fetch from"
        )
    return url


def resolve(
    repository: str,
    ref: str,
    source: str,
    seconds: int = RESOLVE_SECONDS,
) -> str:
    """Return the commit that branch, tag or commit `ref` names in `repository` now.

    Raises SettingsError if it does not exist, or no answer comes within `seconds`.
    """
    if is_whole_commit(ref):
        return ref
    names = (f"refs/tags/{ref}^{{}}", f"refs/tags/{ref}", f"refs/heads/{ref}", ref)
    with progress.waiting(f"looking up {ref} in {repository}, at most {seconds} s"):
        asked = _git(
            "ls-remote",
            "--quiet",
            *read_options(repository),
            "--",
            repository,
            *names,
            seconds=seconds,
        )
    if asked.returncode:
        lines = [*asked.stderr.splitlines(), "no answer"]
        reason = next(
            (line for line in lines if line.startswith("fatal: ")), lines[0]
        ).removeprefix("fatal: ")
        raise SettingsError(
            f"{source}: release_repository: got {repository!r}; can't be read: {reason}"
        )
    commits = {
        name: commit for commit, name in (line.split("\t") for line in asked.stdout.splitlines())
    }
    for name in names:
        if name in commits:
            return commits[name]
    raise SettingsError(
        f"{source}: release_ref: got {ref!r}; expected a branch, tag or whole commit of"
        f" {repository}"
    )


def is_whole_commit(ref: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", ref) is not None


def read_options(repository: str) -> list[str]:
    """Return git options for reading a repository.

    root may have to read the checkout of the user that deploys it to the same machine.
    """
    return (
        ["--upload-pack=git -c safe.directory='*' upload-pack"]
        if repository.startswith("/")
        else []
    )


def _git(*arguments: str, seconds: int = RESOLVE_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run git without prompts and with a time limit."""
    try:
        return subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(error.cmd, 1, "", f"no answer within {seconds} s")


def secrets_mistakes(folder: Path) -> Iterator[str]:
    """Yield the mistakes in a folder of secrets and its files, all of which are optional."""
    try:
        is_wrong = folder.exists() and not folder.is_dir()
    except OSError as error:
        yield f"{folder}: {_reason(error)}; expected a folder for secrets"
        return
    if is_wrong:
        yield f"{folder} is not a folder; expected one for secrets"
        return
    try:
        enrolment_token(folder)
        replaced_tokens(folder)
    except SettingsError as error:
        yield str(error)
    try:
        public_keys(folder)
    except SettingsError as error:
        yield str(error)


def enrolment_token(folder: Path) -> str | None:
    """Return the token in `folder` with which new nodes join the fleet; None if there is none.

    Raises SettingsError if the file does not contain a token.
    """
    file = folder / TOKEN_FILE
    try:
        if not file.exists():
            return None
    except OSError as error:
        raise SettingsError(f"{file}: {_reason(error)}; expected {EXPECTED_TOKEN}") from None
    return read_secret(file, EXPECTED_TOKEN)


def new_token() -> str:
    return secrets.token_urlsafe(32)


def fingerprint(token: str) -> str:
    """Return the digest of a file that contains the token, here or on a host."""
    return hashlib.sha256(f"{token}\n".encode()).hexdigest()


def keep_token(folder: Path, token: str) -> Path | None:
    """Write the token into `folder` atomically; return where the earlier one was moved, or None.

    Raises SettingsError if the file cannot be written.
    """
    file = folder / TOKEN_FILE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = None
        if file.exists():
            aside = file.with_name(f"{TOKEN_FILE}.until-{time.strftime('%Y%m%dT%H%M%S')}")
            os.link(file, aside)
        new = file.with_name(f".{TOKEN_FILE}.new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(f"{token}\n")
        new.rename(file)
    except OSError as error:
        raise SettingsError(f"{file}: {_reason(error)}; expected a place for the token") from None
    return aside


def replaced_tokens(folder: Path) -> set[str]:
    """Return the fingerprints of replaced tokens; hosts that have one get the new token.

    Raises SettingsError if the record cannot be read.
    """
    record = folder / REPLACED_FILE
    try:
        return set(record.read_text().split()) if record.exists() else set()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{record}: {_reason(error)}; expected SHA-256 digests of earlier tokens"
        ) from None


def rotate_token(folder: Path) -> str:
    """Make a new token and record the old one as replaced.

    Raises SettingsError if there is no old token.
    """
    old = enrolment_token(folder)
    if old is None:
        raise SettingsError(f"{folder / TOKEN_FILE}: no such file; nothing to replace; {FETCH}")
    record = folder / REPLACED_FILE
    known = replaced_tokens(folder) | {fingerprint(old)}
    record.write_text("\n".join(sorted(known)) + "\n")
    token = new_token()
    keep_token(folder, token)
    return token


def public_keys(folder: Path) -> dict[str, str]:
    """Return the last known public keys, by host. Raises SettingsError if the record is damaged."""
    record = folder / PUBLIC_KEYS_FILE
    try:
        known: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{record}: {_reason(error)}; {EXPECTED_RECORD}") from None
    if not isinstance(known, dict) or not all(isinstance(key, str) for key in known.values()):
        raise SettingsError(f"{record}: no JSON of that form; {EXPECTED_RECORD}")
    return known


def remember_public_keys(
    folder: Path,
    found: Mapping[str, str],
) -> dict[str, str]:
    """Add public keys to the record, which other runs may be changing too; return all of them."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    record = folder / PUBLIC_KEYS_FILE
    with record.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = public_keys(folder)
        known = {**before, **found}
        if known != before:
            write_whole(record, json.dumps(known, indent=2, sort_keys=True) + "\n")
        return known


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "not text" if isinstance(error, UnicodeDecodeError) else "no JSON"
