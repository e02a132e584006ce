"""Secrets of the account service: root's files on its host, passed to it as credentials."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deploys import host_files, units
from deploys.inventory import secret_files
from deploys.inventory.host_plan import Planned
from deploys.inventory.secret_files import ACCOUNT_SECRETS
from deploys.paths import CONFIGURATION
from deploys.services import Service

PREFIX = "account-"
"""Prefix of the names of these files."""


@dataclass(frozen=True, slots=True)
class Given:
    """The secrets of a service: their digests, and whether one of their files was changed."""

    digests: tuple[str, ...] = ()
    is_new: bool = False


def file_of(key: str) -> Path:
    """Return root's file on the host for the secret that the inventory's `key` names."""
    return CONFIGURATION / f"{PREFIX}{ACCOUNT_SECRETS[key]}"


def drop_in_text(keys: Iterable[str]) -> str:
    """Return the drop-in that passes the secrets to the service; empty without secrets."""
    lines = [f"LoadCredential={ACCOUNT_SECRETS[key]}:{file_of(key)}" for key in sorted(keys)]
    return "\n".join(["[Service]", *lines, ""]) if lines else ""


def install(plan: Planned, service: Service) -> Given:
    """Write the secrets of the account service, and the drop-in that passes them to it."""
    if service.name != "account":
        return Given()
    secrets = plan.host.account_secrets
    is_new = False
    digests = []
    for key, local in sorted(secrets.items()):
        text = secret_files.token(key, local).encode() + b"\n"
        name = f"Write the account service's {ACCOUNT_SECRETS[key]}"
        written = host_files.file(name=name, path=file_of(key), content=text, mode="600")
        is_new |= written.will_change
        digests.append(hashlib.sha256(text).hexdigest())
    text_of_drop_in = drop_in_text(secrets)
    given = units.drop_in(
        name="Give the account service its secrets",
        unit=service.unit,
        text=text_of_drop_in,
        unused=[file_of(key) for key in ACCOUNT_SECRETS if key not in secrets],
    )
    return Given((*digests, text_of_drop_in), is_new or given.will_change)
