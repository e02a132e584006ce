"""The client with our contract, and with chains that are wrong, silent or broken.

Foreign contracts are in test_foreign.py.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from eth_account import Account

from worker import settings
from worker.chain import contract, deployment
from worker.chain.client import Call, NonceUsed, ReceiptTimeout
from worker.chain.coordinator import Coordinator, submitted
from worker.chain.embedded import anvil
from worker.errors import ChainError, ChainUnreachable, ContractRefused, SecretError


def section(**values) -> settings.Chain:
    return settings.parse({"chain": values}, "test").chain


class Answering:
    """An HTTP server on loopback that answers with `reply(body)` -> (status, text)."""

    def __init__(self, reply):
        answering = self
        self.requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answering.requests.append((self.path, body))
                status, text = reply(body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_POST

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *about: None  # a client that gave up waiting
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()


@pytest.fixture
def serve():
    """Start an HTTP server with the given replies."""
    started = []

    def start(reply) -> Answering:
        started.append(Answering(reply))
        return started[-1]

    yield start
    for answering in started:
        answering.server.shutdown()
        answering.server.server_close()


def rpc(answers):
    """Reply with the JSON-RPC result in `answers` for the method."""

    def reply(body):
        request = json.loads(body)
        return 200, json.dumps(
            {"jsonrpc": "2.0", "id": request["id"], **answers[request["method"]]}
        )

    return reply


# ---- our contract


def test_our_contract_is_known(chain):
    assert chain.coordinator.version == contract.carried_version() == "hivewright/3"


def test_negative_reward_keeps_its_sign(chain):
    account = chain.new_account("a")
    chain.send(account, chain.coordinator.submit_reward(0, 0, -250, "a"))
    assert chain.coordinator.submitted_reward(0, 0, "a") == -250


def test_events_arrive_in_both_orders_and_pieces(chain, monkeypatch):
    monkeypatch.setattr("worker.chain.logs.MOST_BLOCKS", 2)
    coordinator = Coordinator(chain.settings.chain)
    for _ in range(5):
        chain.advance()
    numbers = [event.arguments["newRoundNumber"] for event in coordinator.events("RoundAdvanced")]
    newest = coordinator.events("RoundAdvanced", newest_first=True)
    assert numbers == [1, 2, 3, 4, 5]
    assert [event.arguments["newRoundNumber"] for event in newest] == [5, 4, 3, 2, 1]
    some = chain.coordinator.events("RoundAdvanced", {"newRoundNumber": [2, 4]})
    assert [event.arguments["newRoundNumber"] for event in some] == [2, 4]


# ---- refusals


def test_refusal_names_the_error_and_what_to_do(chain):
    chain.new_account("peer")
    with pytest.raises(ContractRefused) as caught:
        chain.coordinator.sign_and_send(
            Account.create(), chain.coordinator.submit_reward(0, 0, 1, "peer")
        )
    assert caught.value.name == "InvalidVoterPeerId"
    assert (
        str(caught.value) == "submitReward: the contract refused: InvalidVoterPeerId; "
        "the sending account did not register this peer id; send from the account that did"
    )


def test_refused_call_uses_no_nonce(chain):
    account = chain.new_account("peer")
    before = chain.coordinator.nonce(account.address)
    with pytest.raises(ContractRefused):
        chain.coordinator.sign_and_send(account, chain.coordinator.register_peer("peer"))
    assert chain.coordinator.nonce(account.address) == before


def test_reverted_transaction_is_an_error(chain):
    """The estimate of its gas passes, and the transaction reverts."""
    account = chain.new_account("peer")
    calls = [chain.coordinator.submit_reward(0, 0, reward, "peer") for reward in (1, 2)]
    nonce = chain.coordinator.nonce(account.address)
    hashes = []
    for offset, call in enumerate(calls):
        tx_hash, raw = chain.coordinator.sign(
            account, call, nonce=nonce + offset, gas=300_000, gas_price_wei=0
        )
        chain.coordinator.send_raw(raw)
        hashes.append(tx_hash)
    receipts = [chain.coordinator.wait_for_receipt(tx_hash, 10) for tx_hash in hashes]
    assert [receipt.succeeded for receipt in receipts] == [True, False]
    assert chain.coordinator.submitted_reward(0, 0, "peer") == 1


def test_same_transaction_sent_twice_is_sent_once(chain):
    account = chain.new_account()
    call = chain.coordinator.register_peer("peer")
    tx_hash, raw = chain.coordinator.sign(account, call, nonce=0, gas=300_000, gas_price_wei=0)
    chain.coordinator.send_raw(raw)
    chain.coordinator.send_raw(raw)
    assert chain.coordinator.wait_for_receipt(tx_hash, 10).succeeded
    assert chain.coordinator.nonce(account.address) == 1


def test_used_nonce_is_an_error_of_its_own(chain):
    account = chain.new_account("peer")
    with pytest.raises(NonceUsed, match="its nonce is used; read the account's nonce again"):
        chain.coordinator.sign_and_send(account, chain.coordinator.register_peer("other"), nonce=0)


def test_receipt_that_does_not_come_times_out(chain):
    with pytest.raises(ReceiptTimeout, match=r"transaction 0x0{64}: not mined within 0.1 s"):
        chain.coordinator.wait_for_receipt("0x" + "00" * 32, 0.1)


# ---- a wrong chain, no chain


def test_wrong_chain_id_is_named(chain):
    client = Coordinator(
        section(rpc_url=chain.deployment.rpc_url, contract=chain.deployment.contract, id=1)
    )
    with pytest.raises(ChainError) as caught:
        client.check()
    assert (
        str(caught.value)
        == f"chain id 31337 answered by {chain.deployment.rpc_url} (chain.rpc_url), expected 1"
        " (chain.id); point one of them at the other"
    )


def test_wrong_chain_is_found_by_the_first_read(chain):
    client = Coordinator(
        section(rpc_url=chain.deployment.rpc_url, contract=chain.deployment.contract, id=1)
    )
    with pytest.raises(ChainError, match="expected 1"):
        client.current_round()


def test_address_without_code_is_named(chain):
    address = "0x" + "11" * 20
    with pytest.raises(
        ChainError,
        match=f"no contract at {address} on chain 31337 .*; check chain.contract, or run",
    ):
        Coordinator(section(rpc_url=chain.deployment.rpc_url, contract=address)).check()


def test_contract_of_another_kind_is_named(chain):
    code = (
        "0x600a600c600039600a6000f3" + "602060005260206000f3"
    )  # returns 32 bytes of number 32 to every call
    address = chain.send(chain.owner, Call("create", bytes.fromhex(code[2:]), None)).contract
    client = Coordinator(section(rpc_url=chain.deployment.rpc_url, contract=address))
    client.check()
    assert client.version is None
    with pytest.raises(ChainError, match="does not answer like a swarm coordinator"):
        client.bootnodes()


def test_nobody_there_is_unreachable():
    client = Coordinator(section(rpc_url="http://127.0.0.1:9", contract="0x" + "11" * 20))
    with pytest.raises(
        ChainUnreachable,
        match=r"http://127.0.0.1:9 \(chain.rpc_url\): no connection \(ConnectionError\)",
    ):
        client.current_round()


def test_mute_server_is_unreachable_in_time(serve):
    silence = threading.Event()
    mute = serve(lambda body: (200, str(silence.wait(5))))
    client = Coordinator(section(rpc_url=mute.url, contract="0x" + "11" * 20, timeout_seconds=0.4))
    with pytest.raises(
        ChainUnreachable, match=r"no answer within 0.4 s; check that it runs and can be reached"
    ):
        client.current_round()
    silence.set()
    assert len(mute.requests) == 2


def test_server_error_is_unreachable_after_a_second_try(serve):
    broken = serve(lambda body: (500, "oops"))
    client = Coordinator(section(rpc_url=broken.url, contract="0x" + "11" * 20))
    with pytest.raises(ChainUnreachable, match="HTTP 500 instead of an answer"):
        client.current_round()
    assert len(broken.requests) == 2


def test_one_server_error_is_survived(chain, serve):
    replies = [(502, "")]
    flaky = serve(
        lambda body: replies.pop() if replies else rpc({"eth_chainId": {"result": "0x7a69"}})(body)
    )
    client = Coordinator(section(rpc_url=flaky.url, contract="0x" + "11" * 20))
    client.check_id()
    assert not replies  # the error was met


@pytest.mark.parametrize("text", ["<html>hello</html>", "[]", '"x"', '{"jsonrpc":"2.0","id":0}'])
def test_answer_that_is_no_rpc_is_named(serve, text):
    server = serve(lambda body: (200, text))
    with pytest.raises(ChainError, match=r"http://127.0.0.1:\d+ \(chain.rpc_url\)"):
        Coordinator(section(rpc_url=server.url, contract="0x" + "11" * 20)).current_round()


def test_rpc_error_is_one_line_of_printable_text(serve):
    error = {"error": {"code": -32000, "message": "bad\n\x1b[31mthing"}}
    server = serve(rpc({"eth_chainId": error}))
    with pytest.raises(ChainError) as caught:
        Coordinator(section(rpc_url=server.url, contract="0x" + "11" * 20)).current_round()
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


# ---- where the chain is


def test_settings_win_over_the_deployment_file(tmp_path):
    file = tmp_path / "deployment.json"
    file.write_text(
        json.dumps(
            {"rpc_url": "http://127.0.0.1:1", "chain_id": 31337, "contract": "0x" + "22" * 20}
        )
    )
    found = deployment.resolve(section(deployment_file=str(file)))
    assert (found.rpc_url, found.contract) == ("http://127.0.0.1:1", "0x" + "22" * 20)
    found = deployment.resolve(section(deployment_file=str(file), rpc_url="http://127.0.0.1:2"))
    assert (found.rpc_url, found.contract) == ("http://127.0.0.1:2", "0x" + "22" * 20)
    found = deployment.resolve(section(deployment_file=str(file), contract="0x" + "33" * 20))
    assert (found.rpc_url, found.contract) == ("http://127.0.0.1:1", "0x" + "33" * 20)


def test_account_service_tells_the_contract(serve):
    account = serve(
        lambda body: (
            200,
            json.dumps({"chain_id": 31337, "contract": "0x" + "44" * 20, "org_id": "x"}),
        )
    )
    found = deployment.resolve(section(account_url=account.url + "/"))
    assert (found.rpc_url, found.contract) == (f"{account.url}/rpc", "0x" + "44" * 20)
    assert account.requests == [("/api/swarm", b"")]


def test_account_service_of_another_chain_is_named(serve):
    account = serve(lambda body: (200, json.dumps({"chain_id": 5, "contract": "0x" + "44" * 20})))
    with pytest.raises(
        ChainError,
        match=r"chain id 5 in .*/api/swarm \(chain.account_url\), expected 31337 \(chain.id\)",
    ):
        deployment.resolve(section(account_url=account.url))


def test_account_service_that_is_down_is_unreachable():
    with pytest.raises(
        ChainUnreachable, match=r"http://127.0.0.1:9/api/swarm \(chain.account_url\): no connection"
    ):
        deployment.resolve(section(account_url="http://127.0.0.1:9"))


def test_nothing_set_is_named():
    assert not deployment.is_configured(section())
    with pytest.raises(
        ChainError, match=r"no chain: chain.rpc_url, .* are all empty; set one of them"
    ):
        deployment.resolve(section())
    with pytest.raises(
        ChainError, match=r"no contract: chain.contract, .* are all empty; set one of them"
    ):
        deployment.resolve(section(rpc_url="http://127.0.0.1:1"))


def test_deployment_file_that_is_not_there_yet_is_waited_for(tmp_path):
    with pytest.raises(
        ChainUnreachable, match="not there yet; `hivewright chain deploy` writes it"
    ):
        deployment.resolve(section(deployment_file=str(tmp_path / "deployment.json")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read"),
        ("[]", "contract is None; expected contract, chain_id, rpc_url of a swarm's chain"),
        ('{"contract": "0x12"}', "contract is '0x12'"),
        ('{"contract": "%s", "chain_id": true}' % ("0x" + "11" * 20), "chain_id is True"),
        (
            '{"contract": "%s", "chain_id": 31337, "rpc_url": "x"}' % ("0x" + "11" * 20),
            "rpc_url is 'x'",
        ),
        (
            '{"contract": "%s", "chain_id": 7, "rpc_url": "http://x"}' % ("0x" + "11" * 20),
            "chain id 7 in .* expected 31337",
        ),
    ],
)
def test_deployment_file_that_is_wrong_is_named(tmp_path, text, message):
    file = tmp_path / "deployment.json"
    file.write_text(text)
    with pytest.raises(ChainError, match=message):
        deployment.resolve(section(deployment_file=str(file)))


def test_owner_key_that_is_no_key_is_named(tmp_path):
    (tmp_path / "owner.key").write_text("hello")
    with pytest.raises(
        SecretError, match=r"owner.key: not 64 hexadecimal digits; expected the key"
    ):
        anvil.load_owner(settings.Keeper(state_dir=tmp_path))


@pytest.mark.parametrize("digest", [None, "ab" * 32])
def test_reward_is_read_from_its_call(chain, digest) -> None:
    """No chain is needed for that, and the digest behind the arguments changes nothing."""
    call = chain.coordinator.submit_reward(3, 0, -1250, "me", digest)
    assert submitted(call) == ("me", -1250)
    assert submitted(chain.coordinator.register_peer("me")) is None
