"""Keys of workers that move: each file is a key, and of one worker only."""

from pathlib import Path

import pytest

from deploys.inventory import key_files
from worker.swarm import identity


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("keys")
    files = [folder / f"{name}.pem" for name in ("first", "second")]
    for file in files:
        identity.create(file)
    return [str(file) for file in files]


def messages(files: dict[tuple[str, int], object]) -> list[str]:
    return [f"{host}: {message}" for (host, _), message in key_files.mistakes(files)]


def test_two_keys_on_two_slots_are_right(keys: list[str]) -> None:
    assert messages({("gpu-1", 0): keys[0], ("gpu-1", 1): keys[1]}) == []


def test_one_key_for_two_workers_is_a_mistake_though_the_files_differ(
    keys: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.pem"
    copy.write_bytes(Path(keys[0]).read_bytes())
    assert messages({("gpu-1", 0): keys[0], ("gpu-2", 3): str(copy)}) == [
        f"gpu-2: slot 3: identity: {copy} is the key of slot 0 of gpu-1 too; two workers can't be"
        " one node"
    ]


@pytest.mark.parametrize("value", [7, None, ["swarm.pem"]])
def test_value_that_is_no_path_is_shown(value: object) -> None:
    assert messages({("gpu-1", 0): value}) == [
        f"gpu-1: slot 0: identity: got {value!r}; expected the path of a swarm.pem"
    ]


def test_file_that_is_missing_or_no_key_is_named(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("secret notes")
    found = messages({("gpu-1", 0): str(tmp_path / "none.pem"), ("gpu-1", 1): str(other)})
    assert found == [
        f"gpu-1: slot 0: identity: {tmp_path}/none.pem: No such file or directory; expected the"
        " path of a swarm.pem",
        f"gpu-1: slot 1: identity: {other}: no libp2p RSA key; expected the path of a swarm.pem",
    ]


def test_key_itself_in_the_place_of_its_path_is_not_shown() -> None:
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----\n"
    (found,) = messages({("gpu-1", 0): key})
    assert "MIIE" not in found
