"""The gate: every kind of request that could keep the chain busy, grow it or change it."""

import pytest
from eth_account import Account

from worker.chain.embedded.gate import METHODS, Gate, NotPassed

CONTRACT = "0x" + "11" * 20
ROUND = "0x8a19c8bc"  # currentRound()
ACCOUNT = Account.from_key("0x" + "22" * 32)


@pytest.fixture
def gate() -> Gate:
    return Gate(31337, CONTRACT, lambda: 50_000)


def signed(**changes: object) -> str:
    plain = {
        "chainId": 31337,
        "nonce": 0,
        "gas": 100_000,
        "gasPrice": 0,
        "value": 0,
        "data": b"x",
        "to": CONTRACT,
    }
    transaction = {key: value for key, value in (plain | changes).items() if value is not None}
    return "0x" + bytes(ACCOUNT.sign_transaction(transaction).raw_transaction).hex()


TYPED = {"gasPrice": None, "maxFeePerGas": 0, "maxPriorityFeePerGas": 0}
AUTHORIZATION = [ACCOUNT.sign_authorization({"chainId": 31337, "address": CONTRACT, "nonce": 0})]


@pytest.mark.parametrize(
    ("method", "params", "reason"),
    [
        ("anvil_impersonateAccount", [CONTRACT], "not served here"),
        ("debug_traceCall", [], "not served here"),
        ("eth_getProof", [CONTRACT, [], "latest"], "not served here"),
        ("eth_newFilter", [{}], "not served here"),
        ("eth_subscribe", ["logs"], "not served here"),
        ("eth_createAccessList", [{}], "not served here"),
        ("eth_simulateV1", [{}], "not served here"),
        ("txpool_content", [], "not served here"),
        ("eth_chainId", {}, "expected a list"),
        ("eth_call", [], "got 0 parameters"),
        ("eth_call", [{"data": "0x5b600056"}], "no `to`"),
        ("eth_call", [{"to": "0x" + "12" * 20, "data": ROUND}], "expected the swarm's contract"),
        (
            "eth_call",
            [{"to": CONTRACT, "data": "0x5b600056"}],
            "is not a function of the swarm's contract",
        ),
        ("eth_call", [{"to": CONTRACT}], "got None"),
        (
            "eth_call",
            [{"to": CONTRACT, "data": ROUND}, "latest", {CONTRACT: {"code": "0x5b600056"}}],
            "got 3 param",
        ),
        (
            "eth_call",
            [{"to": CONTRACT, "data": ROUND, "accessList": [{}] * 99}],
            "accessList is not accepted here",
        ),
        ("eth_call", [{"to": CONTRACT, "data": ROUND, "chainId": "0x1"}], "this is chain 31337"),
        ("eth_estimateGas", [{"data": "0x5b600056"}], "no `to`"),
        ("eth_getStorageAt", ["0x" + "12" * 20, "0x0", "latest"], "expected the swarm's contract"),
        ("eth_getLogs", [{"fromBlock": "0x0"}], "got 50001 blocks; expected at most 10000"),
        ("eth_getLogs", [{"fromBlock": "earliest", "toBlock": "latest"}], "got 50001 blocks"),
        (
            "eth_getLogs",
            [{"fromBlock": "0x0", "toBlock": "0xffffffffff"}],
            "blocks; expected at most 10000",
        ),
        ("eth_getLogs", [{"address": ["0x" + "12" * 20, CONTRACT]}], "got 2 addresses"),
        ("eth_getLogs", [{"address": "0x" + "12" * 20}], "expected the swarm's contract"),
        ("eth_getLogs", [{"topics": [["0x" + "00" * 32] * 99]}], "at most 64 alternatives"),
        ("eth_feeHistory", ["0x400", "latest", []], "got 1024 blocks"),
        ("eth_feeHistory", [4, "latest", [1] * 99], "at most 16 percentiles"),
        ("eth_getBalance", [CONTRACT, {"blockHash": "0x00"}], "expected a hexadecimal number"),
        ("eth_sendRawTransaction", [signed(to=None, data=b"code")], "creates a contract"),
        ("eth_sendRawTransaction", [signed(to=ACCOUNT.address)], "expected the swarm's contract"),
        (
            "eth_sendRawTransaction",
            [signed(chainId=685685)],
            "signed for chain id 685685; this is chain 31337",
        ),
        ("eth_sendRawTransaction", [signed(chainId=5, **TYPED)], "signed for chain id 5"),
        ("eth_sendRawTransaction", [signed(chainId=None)], "signed for chain id None"),
        ("eth_sendRawTransaction", [signed(gas=10**9)], "gas is 1000000000; expected at most"),
        ("eth_sendRawTransaction", [signed(data=b"x" * 40_000)], "expected at most 65536"),
        (
            "eth_sendRawTransaction",
            [signed(authorizationList=AUTHORIZATION, **TYPED)],
            "of type 4; expected 0, 1 or 2",
        ),
        ("eth_sendRawTransaction", ["0x"], "no signed transaction"),
        ("eth_sendRawTransaction", ["0x02c0"], "no signed transaction"),
        ("eth_sendRawTransaction", ["0xf8"], "no signed transaction"),
        ("eth_sendRawTransaction", ["0x123"], "whole bytes"),
        ("eth_sendRawTransaction", [7], "expected a hexadecimal number"),
    ],
)
def test_what_could_harm_the_chain_is_refused_with_a_reason(gate, method, params, reason) -> None:
    with pytest.raises(NotPassed) as caught:
        gate.check(method, params)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gas_of_calls_is_capped_whatever_was_asked_for(gate) -> None:
    for given in ({}, {"gas": "0xffffffffffff"}, {"gas": 2**60}):
        call, block = gate.check(
            "eth_call", [{"to": CONTRACT, "input": ROUND, **given}, "pending"]
        ).params
        assert (call, block) == ({"to": CONTRACT, "data": ROUND, "gas": hex(50_000_000)}, "latest")
    call, _ = gate.check("eth_call", [{"to": CONTRACT, "data": ROUND, "gas": "0x5208"}]).params
    assert call["gas"] == "0x5208"


@pytest.mark.parametrize(
    "changes", [{}, TYPED, {"accessList": [], **TYPED}, {"accessList": [], "type": 1}]
)
def test_signed_transactions_to_the_contract_pass_with_their_sender(gate, changes) -> None:
    raw = signed(**changes)
    passed = gate.check("eth_sendRawTransaction", [raw])
    assert (passed.params, passed.sender) == ([raw], ACCOUNT.address)


def test_logs_are_of_the_contract_and_of_blocks_that_are_counted(gate) -> None:
    (logs,) = gate.check(
        "eth_getLogs", [{"fromBlock": "0xc000", "topics": [None, ["0x" + "00" * 32]]}]
    ).params
    assert logs == {
        "address": CONTRACT,
        "fromBlock": "0xc000",
        "toBlock": hex(50_000),
        "topics": [None, ["0x" + "00" * 32]],
    }


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(
    "value", [None, True, -1, 2**300, "", "x", "0x", {}, [], [[]], {"to": {}}, "0x" + "f" * 70]
)
def test_no_value_of_a_parameter_gets_through_unread(gate, method, value) -> None:
    """Any value passes or is refused; no other error is raised."""
    for params in ([value], [value, value], [CONTRACT, value], [value] * 3):
        try:
            gate.check(method, params)
        except NotPassed:
            continue
