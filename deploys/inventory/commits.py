"""The commit that each host gets, looked up once on the operator's side."""

from collections.abc import Iterable
from pathlib import Path

from deploys import operator
from deploys.inventory import secret_files
from deploys.inventory.host_plan import HostEntry
from deploys.inventory.schema import Deployment
from worker.errors import SettingsError

CHECKOUT = Path(__file__).parents[2]


def look_up(
    entries: Iterable[HostEntry],
    seconds: int,
) -> dict[str, tuple[str, str]]:
    """Return git URL and commit by host. Raises SettingsError, with a line for each mistake."""
    commits: dict[str, tuple[str, str]] = {}
    lines = []
    for (repository, ref), names in _users(entries).items():
        source = f"inventory data of {', '.join(names)}"
        try:
            url = repository or _origin(source)
            commit = operator.resolve(url, ref, source, seconds)
        except SettingsError as error:
            lines.append(str(error))
            continue
        commits.update(dict.fromkeys(names, (url, commit)))
    if lines:
        raise SettingsError("\n".join(lines))
    return commits


def _users(entries: Iterable[HostEntry]) -> dict[tuple[str | None, str], list[str]]:
    """Return the names of hosts by repository and ref; those with mistakes are left out."""
    users: dict[tuple[str | None, str], list[str]] = {}
    for entry in entries:
        repository = entry.data.get("release_repository")
        ref = entry.data.get("release_ref", Deployment.model_fields["release_ref"].default)
        # `validation.check` reports wrong types and passwords in URLs.
        if not isinstance(repository, str | None) or not isinstance(ref, str):
            continue
        if not secret_files.shows_password(repository):
            users.setdefault((repository, ref), []).append(entry.name)
    return users


def _origin(source: str) -> str:
    url = operator.origin(CHECKOUT, source)
    if secret_files.shows_password(url):
        instead = secret_files.IN_URLS["release_repository"]
        raise SettingsError(
            f"{source}: release_repository: not set, and origin of {CHECKOUT} {secret_files.SHOWN};"
            f" {instead}"
        )
    return url
