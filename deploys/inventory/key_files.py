"""Check keys of workers that move: files on the operator's side, named as `identity` of slots."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from deploys.inventory import secret_files
from worker.errors import IdentityError, SettingsError
from worker.swarm import identity

# Name of the host, number of the slot.
Place = tuple[str, int]


def mistakes(key_files: Mapping[Place, object]) -> Iterator[tuple[Place, str]]:
    """Yield place and message for each mistake in these files.

    A key belongs to one worker: two workers with one key would claim one reward.
    """
    users: dict[str, Place] = {}
    for place, key_file in key_files.items():
        try:
            peer_id = _peer_id(key_file)
        except SettingsError as error:
            yield place, f"slot {place[1]}: identity: {error}; expected the path of a swarm.pem"
            continue
        if peer_id in users:
            host, number = users[peer_id]
            message = (
                f"{key_file} is the key of slot {number} of {host} too; two workers can't be one"
                " node"
            )
            yield place, f"slot {place[1]}: identity: {message}"
        users.setdefault(peer_id, place)


def _peer_id(key_file: object) -> str:
    """Return the peer id of the key in a file. Raises SettingsError, with the reason only."""
    if not isinstance(key_file, str):
        raise SettingsError(f"got {key_file!r}")
    if secret_files.is_secret(key_file):
        raise SettingsError(secret_files.ITSELF)
    try:
        Path(key_file).read_bytes()
        return identity.load(Path(key_file)).peer_id
    except OSError as error:
        raise SettingsError(f"{key_file}: {error.strerror}") from None
    except IdentityError:
        raise SettingsError(f"{key_file}: no libp2p RSA key") from None
