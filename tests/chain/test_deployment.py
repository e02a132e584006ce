"""Locating the chain: settings before the deployment file, that before the account service."""

import json
from pathlib import Path
from typing import Any

import pytest

from worker.chain.deployment import read_deployment, resolve
from worker.errors import ChainError, ChainUnreachable
from worker.settings import Chain

CONTRACT, OTHER = "0x" + "Aa" * 20, "0x" + "bB" * 20
URL = "http://127.0.0.1:8545"


def written(folder: Path, **changes: Any) -> Path:
    content = {"rpc_url": URL, "chain_id": 31337, "contract": CONTRACT, **changes}
    file = folder / "deployment.json"
    file.write_text(json.dumps(content))
    return file


def test_deployment_file_alone_is_enough(tmp_path: Path) -> None:
    found = resolve(Chain(deployment_file=written(tmp_path, contract_block=7)))
    assert (found.rpc_urls, found.chain_id, found.contract_block) == ((URL,), 31337, 7)
    assert found.contract.lower() == CONTRACT.lower()


def test_settings_win_and_the_block_is_of_the_written_contract_only(tmp_path: Path) -> None:
    file = written(tmp_path, contract_block=7)
    found = resolve(Chain(deployment_file=file, contract=OTHER))
    assert (found.contract.lower(), found.contract_block) == (OTHER.lower(), None)
    assert found.rpc_urls == (URL,)
    found = resolve(Chain(deployment_file=file, rpc_url="http://127.0.0.1:1"))
    assert (found.rpc_urls, found.contract_block) == (("http://127.0.0.1:1",), 7)


def test_account_service_forwards_the_requests_of_nodes_that_name_nothing_else() -> None:
    found = resolve(Chain(account_url="http://127.0.0.1:1/", contract=CONTRACT))
    assert found.rpc_urls == ("http://127.0.0.1:1/rpc",)


@pytest.mark.parametrize("block", [-1, True, "7", None, 1.5])
def test_block_that_is_no_number_of_a_block_is_ignored(tmp_path: Path, block: object) -> None:
    file = written(tmp_path, contract_block=block)
    assert read_deployment(file, 31337).contract_block is None


def test_socket_is_used_where_its_folder_is(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "chain.sock", tmp_path / "missing/chain.sock"
    assert read_deployment(written(tmp_path, socket=str(here)), 31337).rpc_url == f"unix:{here}"
    assert read_deployment(written(tmp_path, socket=str(elsewhere)), 31337).rpc_url == URL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chain_id": 1}, "chain id 1 in .*, expected 31337"),
        ({"chain_id": "31337"}, "chain_id is '31337'; expected"),
        ({"contract": "0x12"}, "contract is '0x12'; expected"),
        ({"rpc_url": "ftp://x"}, "rpc_url is 'ftp://x'; expected"),
        ({"market": "0x12"}, "market is '0x12'; expected 0x and 40 hex digits"),
        ({"market": 7}, "market is 7; expected"),
    ],
)
def test_wrong_file_is_an_error_that_names_the_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ChainError, match=message):
        read_deployment(written(tmp_path, **changes), 31337)


def test_missing_file_may_come_and_missing_settings_do_not(tmp_path: Path) -> None:
    with pytest.raises(ChainUnreachable, match="not there yet"):
        read_deployment(tmp_path / "none.json", 31337)
    with pytest.raises(ChainError, match="no chain: "):
        resolve(Chain())
    with pytest.raises(ChainError, match="no contract: "):
        resolve(Chain(rpc_url=URL))
