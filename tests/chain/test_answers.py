"""Malformed answers of a chain: every call of the client ends with a value or a WorkerError."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from worker.chain.coordinator import Coordinator
from worker.chain.rpc import Rpc
from worker.chain.transaction_queue import Sender
from worker.errors import ChainError, WorkerError

ODD = [None, "", "zz", "0x1", 5, [], {}, {"a": 1}, True, [None], ["0x1"], "0x" + "ff" * 64]
ASKED_BY = {
    "eth_blockNumber": ["block_number"],
    "eth_call": ["current_round", "bootnodes", "registered", "peers_of", "votes"],
    "eth_estimateGas": ["estimate_gas", "estimate_all"],
    "eth_gasPrice": ["gas_price"],
    "eth_getBlockByNumber": ["block_time", "block_hash"],
    "eth_getCode": ["has_code", "check"],
    "eth_getLogs": ["events"],
    "eth_getTransactionByHash": ["reward_digest"],
    "eth_getTransactionCount": ["nonce"],
    "eth_getTransactionReceipt": ["receipt"],
    "eth_sendRawTransaction": ["send"],
}


@pytest.mark.parametrize("method", ASKED_BY)
def test_odd_answer_is_an_error_of_ours_in_one_line(chain, tmp_path, monkeypatch, method) -> None:
    account = chain.new_account("a")
    tx_hash = chain.send(account, chain.coordinator.submit_reward(0, 0, 5, "a", "ab" * 32)).tx_hash
    sender = Sender(chain.coordinator, account, tmp_path / "journal.db")
    client = Coordinator(chain.coordinator._chain.model_copy(update={"timeout_seconds": 2.0}))
    client.check()
    new = client.register_peer("new")
    calls = {
        "block_number": client.block_number,
        "current_round": client.current_round,
        "bootnodes": client.bootnodes,
        "registered": lambda: client.registered(["a"]),
        "peers_of": lambda: client.read("getPeerId(address[])", [account.address])[0],
        "votes": lambda: client.votes(0, "a"),
        "estimate_gas": lambda: client.estimate_gas(account.address, new),
        "estimate_all": lambda: client.estimate_all(account.address, [new, new]),
        "gas_price": client.gas_price,
        "block_time": lambda: client.block_time(1),
        "block_hash": lambda: client.block_hash(1),
        "has_code": lambda: client.has_code(chain.deployment.contract),
        "check": client.check,
        "events": lambda: list(client.events("RewardSubmitted")),
        "reward_digest": lambda: client.reward_digest(tx_hash),
        "nonce": lambda: client.nonce(account.address),
        "receipt": lambda: client.receipt(tx_hash),
        "send": lambda: sender.send(new),
    }
    odd: list[object] = []
    post = Rpc._post

    def mangled(self: Rpc, url: str, body: bytes) -> object:
        answer, asked = post(self, url, body), json.loads(body)
        if odd and isinstance(asked, dict) and asked["method"] == method:
            return {"jsonrpc": "2.0", "id": asked["id"], "result": odd[0]}
        return answer

    monkeypatch.setattr(Rpc, "_post", mangled)
    for value in ODD:
        for name in ASKED_BY[method]:
            odd[:] = [value]
            said = error_of(calls[name])
            odd.clear()
            assert "\n" not in said, (name, value)
    sender.close()


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except WorkerError as error:
        return str(error)
    return ""


def test_odd_answer_is_named_with_the_call_and_the_address(chain, monkeypatch) -> None:
    post = Rpc._post

    def mangled(self: Rpc, url: str, body: bytes) -> object:
        answer = post(self, url, body)
        return answer | {"result": {"a": 1}} if b"Receipt" in body else answer

    monkeypatch.setattr(Rpc, "_post", mangled)
    with pytest.raises(ChainError) as caught:
        chain.coordinator.receipt("0x" + "11" * 32)
    url = chain.deployment.rpc_url
    assert (
        str(caught.value)
        == f"eth_getTransactionReceipt: {url} (chain.rpc_url) gives an answer in an unexpected form"
        " (KeyError: 'blockNumber'); check that this is a chain's address"
    )


def test_contract_that_answers_with_too_few_is_named(chain, monkeypatch) -> None:
    """A foreign contract may return a list of another length: the ABI does not fix it."""
    read = Coordinator._read
    monkeypatch.setattr(
        Coordinator, "_read", lambda *call: [] if "string[]" in call[1] else read(*call)
    )
    for ask in (
        lambda: chain.coordinator.owner_of("a"),
        lambda: chain.coordinator.registered(["a"]),
    ):
        with pytest.raises(ChainError, match=r"getEoa: .* gives an answer in an unexpected form"):
            ask()


def test_peer_id_that_is_no_text_ends_nobody_s_reading(chain) -> None:
    """A contract accepts any bytes as a peer id; the log and the leaderboard stay readable."""
    chain.new_account("good")
    outsider = chain.new_account("voter")
    for call in (
        chain.coordinator.register_peer("odd."),
        chain.coordinator.submit_winners(0, ["odd."], "voter"),
    ):
        chain.send(outsider, replace(call, data=call.data.replace(b"odd.", b"odd\xff")))
    peers = [event.arguments["peerId"] for event in chain.coordinator.events("PeerRegistered")]
    assert peers == ["good", "voter", "odd\\xff"]
    assert chain.coordinator.winner_leaderboard(0, 10) == [("odd\\xff", 1)]
