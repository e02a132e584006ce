"""The door in front of the embedded chain: requests through its port and through its socket."""

import argparse
import socket
import stat

import pytest
import requests
from account_service import account_settings, eventually, serving
from eth_account import Account

from worker.chain import http
from worker.chain.client import Call
from worker.chain.coordinator import Coordinator
from worker.chain.embedded import anvil, door, fund
from worker.chain.quotas import Quota
from worker.errors import ChainError, ChainUnreachable, SettingsError


@pytest.fixture
def opened(place):
    """Run an anvil with a door, as `chain up` does."""
    inner = place.anvil.model_copy(update={"port": 0})
    with door.opened(place.anvil, 31337) as opened, anvil.running(inner, 31337) as (_, url):
        opened.target = url
        anvil._address_file(place.anvil).write_text(opened.url)
        yield opened


def ask(url: str, method: str, params: list) -> dict:
    with http.open_session() as session:
        asked = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return session.post(url, json=asked, timeout=20).json()


CONTROL = [
    ("anvil_impersonateAccount", ["0x" + "11" * 20]),
    ("anvil_setCode", ["0x" + "11" * 20, "0x00"]),
    ("anvil_dumpState", []),
    ("evm_mine", []),
    ("hardhat_reset", []),
    ("eth_sendTransaction", [{"from": "0x" + "11" * 20, "to": "0x" + "11" * 20}]),
    ("debug_traceCall", [{}, "latest"]),
    ("eth_getProof", ["0x" + "11" * 20, [], "latest"]),
    ("eth_newFilter", [{}]),
    ("txpool_content", []),
]


@pytest.mark.parametrize(("method", "params"), CONTROL)
def test_nobody_controls_the_chain_through_port_or_socket(place, opened, method, params) -> None:
    for url in (opened.url, f"{http.UNIX}{door.socket_of(place.anvil)}"):
        assert ask(url, method, params)["error"]["code"] == -32601


def test_contracts_are_created_through_the_socket_alone(place, opened) -> None:
    deployed = anvil.deploy(place)
    assert deployed.rpc_url == f"{http.UNIX}{door.socket_of(place.anvil)}"
    assert (
        f'"rpc_url": "{opened.url}"' in place.chain.deployment_file.read_text()
    )  # for the version before
    account, create = Account.create(), Call("x", bytes.fromhex("6001600055"), None)
    through_port = Coordinator(place.chain.model_copy(update={"rpc_url": opened.url}))
    _, raw = through_port.sign(account, create, nonce=0, gas=100_000, gas_price_wei=0)
    with pytest.raises(ChainError, match="creates a contract"):
        through_port.send_raw(raw)
    with pytest.raises(ChainError):
        through_port.estimate_gas(account.address, create)
    through_port.transact(account, through_port.register_peer("QmPeer"), 10, nonce=0)
    assert through_port.owner_of("QmPeer") == account.address
    assert Coordinator(place.chain).owner_of("QmPeer") == account.address


def test_copies_of_a_transaction_are_not_counted_for_whoever_signed_it(
    place, opened, monkeypatch
) -> None:
    anvil.deploy(place)
    through_port = Coordinator(place.chain.model_copy(update={"rpc_url": opened.url}))
    account = Account.create()

    def send(nonce: int) -> dict:
        call = through_port.register_peer(f"Qm{nonce}")
        _, raw = through_port.sign(account, call, nonce=nonce, gas=1_000_000, gas_price_wei=0)
        raws.append("0x" + raw.hex())
        return ask(opened.url, "eth_sendRawTransaction", [raws[-1]])

    raws: list[str] = []
    monkeypatch.setattr(opened, "_sends", Quota(0.0, 2))
    assert "result" in send(0)
    eventually(lambda: through_port.owner_of("Qm0") == account.address, 10)
    for _ in range(3):
        copied = ask(opened.url, "eth_sendRawTransaction", raws)
        assert "error" in copied
    opened._sent.clear()  # as after a restart of the door
    for _ in range(3):
        assert (
            "nonce too low" in ask(opened.url, "eth_sendRawTransaction", raws)["error"]["message"]
        )
    assert "result" in send(1)
    assert send(2)["error"]["code"] == -32005


def test_endless_loop_through_the_port_is_refused(place, opened) -> None:
    loop = {"data": "0x5b600056", "gas": "0xffffffffffff"}
    assert "no `to`" in ask(opened.url, "eth_call", [loop, "latest"])["error"]["message"]
    override = {"0x" + "11" * 20: {"code": "0x5b600056"}}
    call = {"to": "0x" + "11" * 20, "data": "0x00000000"}
    assert "error" in ask(opened.url, "eth_call", [call, "latest", override])


def test_account_service_reaches_the_chain_through_the_socket(place, opened, tmp_path) -> None:
    anvil.deploy(place)
    parsed = account_settings(place, tmp_path / "account")
    with serving(parsed) as service:
        asked = {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}
        headers = {"Authorization": f"Bearer {service.token_of('QmPeer')}"}
        answer = requests.post(f"{service.url}/rpc", json=asked, headers=headers, timeout=20)
        assert answer.json() == {"jsonrpc": "2.0", "id": 1, "result": "0x7a69"}
        body = {"orgId": "hivewright", "peerId": "QmPeer"}
        assert requests.post(
            f"{service.url}/api/register-peer", json=body, headers=headers, timeout=20
        ).ok
        eventually(lambda: Coordinator(place.chain).owner_of("QmPeer"), 10)


def test_host_gives_an_account_money_and_nobody_else_does(place, opened) -> None:
    assert "error" in ask(opened.url, "anvil_setBalance", ["0x" + "11" * 20, "0x1"])
    for total in (2, 4):
        fund.run(place, argparse.Namespace(address="0x" + "11" * 20, amount="2"))
        held = ask(opened.url, "eth_getBalance", ["0x" + "11" * 20, "latest"])["result"]
        assert int(held, 16) == total * 10**18
    for address, amount in (("0x12", "1"), ("0x" + "11" * 20, "-1"), ("0x" + "11" * 20, "much")):
        with pytest.raises(SettingsError):
            fund.run(place, argparse.Namespace(address=address, amount=amount))


def test_fund_without_an_embedded_chain_says_so(place) -> None:
    with pytest.raises(ChainUnreachable, match="no embedded chain serves here"):
        fund.run(place, argparse.Namespace(address="0x" + "11" * 20, amount="1"))


def test_socket_is_for_its_user_alone(place, opened) -> None:
    file = door.socket_of(place.anvil)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_port_takes_no_upgrade_no_stream_of_garbage_and_no_long_batch(opened) -> None:
    for body in (b"", b"[" * 100_000, b"[]", b"7", b"[1]", b'{"id": {}}'):
        assert requests.post(opened.url, data=body, timeout=20).status_code in (200, 400)
    long = [{"jsonrpc": "2.0", "id": i, "method": "eth_chainId", "params": []} for i in range(21)]
    assert requests.post(opened.url, json=long, timeout=20).status_code == 400
    headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
    assert requests.get(opened.url, headers=headers, timeout=20).status_code == 405


def test_chain_that_is_away_is_answered_with_503(place) -> None:
    with door.opened(place.anvil, 31337) as opened:
        asked = {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}
        assert requests.post(opened.url, json=asked, timeout=20).status_code == 503


def test_network_of_its_own_is_noticed(monkeypatch) -> None:
    assert not door._is_walled() or socket.if_nameindex() == [(1, "lo")]
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo")])
    assert door._is_walled()
