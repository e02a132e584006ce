"""The contracts in the package: their versions, and the errors that nodes send back."""

import pytest
from eth_utils.abi import function_abi_to_4byte_selector

from worker.chain import contract
from worker.chain.contract import ADVICE, is_version, number_of, refusal


def selector(name: str) -> str:
    (entry,) = [e for e in contract.coordinator_abi() if e["type"] == "error" and e["name"] == name]
    return "0x" + function_abi_to_4byte_selector(entry).hex()


def test_named_error_comes_with_advice_whatever_its_arguments() -> None:
    for arguments in ("", "00" * 64):
        error = refusal("submitReward", selector("InvalidRoundNumber") + arguments, "reverted")
        assert error.name == "InvalidRoundNumber"
        assert str(error) == (
            "submitReward: the contract refused: InvalidRoundNumber;"
            f" {ADVICE['InvalidRoundNumber']}"
        )


@pytest.mark.parametrize("data", [None, "", "0x", "0xdeadbeef", 7, {"code": 3}, b"\x00"])
def test_other_data_of_a_node_is_an_error_without_a_name(data: object) -> None:
    error = refusal("submitReward", data, "execution reverted\x1b[2J", " (proxy)")
    assert error.name == ""
    assert "\x1b" not in str(error)
    assert "the contract refused: execution reverted" in str(error)
    assert "(proxy); check chain.contract" in str(error)


def test_node_without_a_message_is_quoted_as_such() -> None:
    assert "the contract refused: no reason given;" in str(refusal("call", None, None))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hivewright/1", True),
        ("hivewright/123456", True),
        ("hivewright/0", False),
        ("hivewright/01", False),
        ("hivewright/1234567", False),
        ("hivewright/1 ", False),
        ("hivewright/", False),
        ("other/1", False),
    ],
)
def test_versions_of_ours(text: str, expected: bool) -> None:
    assert is_version(text) is expected
    if expected:
        assert number_of(text) == int(text.split("/")[1])


@pytest.mark.parametrize("name", ["SwarmCoordinator", "PredictionMarket"])
def test_contract_in_the_package_has_what_a_deploy_needs(name: str) -> None:
    found = contract.artifact(name)
    assert is_version(contract.carried_version(name))
    assert len(bytes.fromhex(found["bytecode"].removeprefix("0x"))) < 24_576  # the limit of a chain
    assert {"abi", "storage_layout", "source_sha256", "compiler"} <= found.keys()


def test_proxy_is_created_for_its_owner() -> None:
    owner, implementation = "0x" + "11" * 20, "0x" + "22" * 20
    data = contract.proxy_data(owner, implementation)
    assert bytes.fromhex("11" * 20) in data
    assert bytes.fromhex("22" * 20) in data
    assert data != contract.proxy_data("0x" + "33" * 20, implementation)
