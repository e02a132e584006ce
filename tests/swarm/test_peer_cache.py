"""The peer cache on the disk: whatever is in the file, a node starts."""

import json
from pathlib import Path

import pytest

from worker.swarm.discovery import peer_cache
from worker.swarm.discovery.peer_cache import MAX_ADDRESSES_CACHED, MAX_FILE_BYTES, Cache

PEER = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWa"


def test_cache_comes_back(tmp_path: Path) -> None:
    cache = Cache(4001, (PEER,), (f"{PEER}b",))
    peer_cache.save(tmp_path / "peers.json", cache)
    assert peer_cache.load(tmp_path / "peers.json") == cache


def test_missing_file_is_an_empty_cache_and_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert peer_cache.load(tmp_path / "peers.json") == Cache()
    assert caplog.text == ""


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '"text"',
        '{"port": 1}',
        '{"port": null, "peers": []}',
        '{"port": 1e999, "peers": []}',
        '{"port": 1, "peers": 7}',
        "[" * 100_000,
        '{"port": 1, "peers": ["' + "x" * MAX_FILE_BYTES + '"]}',
    ],
    ids=lambda content: content[:24] or "empty",
)
def test_corrupt_file_is_ignored_and_logged(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "peers.json"
    file.write_text(content)
    assert peer_cache.load(file) == Cache()
    assert f"peer cache ignored path={file}" in caplog.text


def test_file_of_a_version_without_bootnodes_is_read(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    file.write_text(json.dumps({"version": 1, "port": 4001, "peers": [PEER]}))
    assert peer_cache.load(file) == Cache(4001, (PEER,))


@pytest.mark.parametrize("port", [-1, 65536])
def test_port_that_can_t_be_is_forgotten(tmp_path: Path, port: int) -> None:
    file = tmp_path / "peers.json"
    file.write_text(json.dumps({"port": port, "peers": [PEER]}))
    assert peer_cache.load(file) == Cache(0, (PEER,))


def test_no_more_addresses_than_the_limit_are_read(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    file.write_text(json.dumps({"port": 1, "peers": [PEER] * (MAX_ADDRESSES_CACHED + 1)}))
    assert len(peer_cache.load(file).peers) == MAX_ADDRESSES_CACHED
