"""The peer cache on the disk: whatever is in the file, a node starts."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

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


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@hypothesis_settings(max_examples=60, deadline=None, database=None)
@given(port=_JSON, peers=_JSON, bootnodes=_JSON)
def test_file_of_any_json_is_a_cache_within_its_limits(
    port: object, peers: object, bootnodes: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "peers.json"
    file.write_text(json.dumps({"port": port, "peers": peers, "bootnodes": bootnodes}))
    found = peer_cache.load(file)
    assert 0 <= found.port <= 65535
    for texts in (found.peers, found.bootnodes):
        assert all(isinstance(text, str) for text in texts)
    if isinstance(peers, list) and isinstance(bootnodes, list) and type(port) is int:
        assert found.peers == tuple(map(str, peers))


def test_folder_in_the_place_of_the_file_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert peer_cache.load(tmp_path) == Cache()
    assert "Is a directory" in caplog.text
