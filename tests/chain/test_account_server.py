import base64
import concurrent.futures
import contextlib
import json
import logging
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests
from account_service import (
    ENROLMENT_TOKEN,
    account_settings,
    eventually,
    faulty,
    serving,
    some_identity,
)
from eth_account import Account

from tests import preloaded
from worker import settings
from worker.account import server
from worker.account.vault import Tokens, load_account
from worker.chain.client import Call
from worker.chain.quotas import Quota
from worker.errors import IdentityError, ResourceError, SecretError, SettingsError

PEER = "QmPeer"


@pytest.fixture
def service(chain, tmp_path):
    with serving(account_settings(chain.settings, tmp_path / "account")) as running:
        yield running


@pytest.fixture
def token(tmp_path, service) -> str:
    return Tokens(tmp_path / "account").issue(PEER)


@pytest.fixture
def node(tmp_path_factory):
    return some_identity(tmp_path_factory.getbasetemp())


def post(service, path: str, body: object, token: str | None = None) -> tuple[int, dict]:
    headers = {"Content-Type": "application/json"}
    headers |= {} if token is None else {"Authorization": f"Bearer {token}"}
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = requests.post(service.url + path, data=raw, headers=headers, timeout=20)
    return answer.status_code, answer.json()


def register(service, token: str | None, **changes: object) -> tuple[int, dict]:
    return post(
        service, "/api/register-peer", {"orgId": "hivewright", "peerId": PEER} | changes, token
    )


# ---- the login API of RL Swarm


@pytest.mark.parametrize(
    ("query", "status", "text"),
    [
        ("?orgId=hivewright", 200, "activated"),
        ("?orgId=else", 200, "pending"),
        ("", 400, '{"error": "orgId: missing"}'),
    ],
)
def test_api_key_status(service, query, status, text) -> None:
    answer = requests.get(service.url + "/api/get-api-key-status" + query, timeout=10)
    assert (answer.status_code, answer.text) == (status, text)


def test_service_at_an_address_of_its_own_answers_on_its_machine_too(chain, tmp_path) -> None:
    """`tailscale_serve` forwards to 127.0.0.1."""
    parsed = account_settings(chain.settings, tmp_path / "account")
    # Loopback's second address: other machines' way to this one, for want of another machine.
    own = parsed.account.model_copy(update={"host": "127.0.0.2"})
    (tmp_path / "account.yaml").write_text(
        settings.dump(parsed.model_copy(update={"account": own}))
    )
    command = [sys.executable, "-m", "worker", "account", "--settings", tmp_path / "account.yaml"]
    with preloaded.Popen(command, "worker.account.server", stderr=subprocess.DEVNULL) as process:
        try:
            address = tmp_path / "account/address"
            eventually(address.exists)
            url = address.read_text().strip()
            assert url.startswith("http://127.0.0.2:")
            for each in (url, url.replace("127.0.0.2", "127.0.0.1")):
                assert requests.get(f"{each}/api/swarm", timeout=10).status_code == 200
        finally:
            process.terminate()
    assert process.returncode == 0


def test_calls_of_the_login_api_answer_with_a_hash_and_reach_the_chain(
    chain, service, token
) -> None:
    status, answer = register(service, token)
    assert (status, list(answer)) == (200, ["hash"])
    reward = {
        "orgId": "hivewright",
        "peerId": PEER,
        "roundNumber": 0,
        "stageNumber": 0,
        "reward": -3,
    }
    assert post(service, "/api/submit-reward", reward, token)[0] == 200
    vote = {
        "orgId": "hivewright",
        "peerId": PEER,
        "roundNumber": 0,
        "winners": [PEER, "QmYou"],
        "extra": 1,
    }
    status, answer = post(service, "/api/submit-winner", vote, token)
    assert status == 200
    assert chain.coordinator.wait_for_receipt(answer["hash"], 10).succeeded
    assert chain.coordinator.owner_of(PEER) == service.service.address
    assert chain.coordinator.submitted_reward(0, 0, PEER) == -3
    assert chain.coordinator.votes(0, PEER) == [PEER, "QmYou"]


def test_errors_of_the_contract_come_by_name(chain, service, token) -> None:
    chain.new_account(PEER)
    assert register(service, token) == (400, {"error": "PeerIdAlreadyRegistered"})
    reward = {
        "orgId": "hivewright",
        "peerId": PEER,
        "roundNumber": 9,
        "stageNumber": 0,
        "reward": 1,
    }
    assert post(service, "/api/submit-reward", reward, token) == (
        400,
        {"error": "InvalidRoundNumber"},
    )
    vote = {"orgId": "hivewright", "peerId": PEER, "roundNumber": 0, "winners": ["a"]}
    assert post(service, "/api/submit-winner", vote, token) == (
        400,
        {"error": "InvalidVoterPeerId"},
    )


def test_64_nodes_registering_at_once_lose_nothing(chain, service, tmp_path) -> None:
    tokens = Tokens(tmp_path / "account")
    peers = [f"Qm{i}" for i in range(1, 65) if "0" not in str(i)]
    with concurrent.futures.ThreadPoolExecutor(len(peers)) as threads:
        answers = list(
            threads.map(lambda peer: register(service, tokens.issue(peer), peerId=peer), peers)
        )
    assert {status for status, _ in answers} == {200}
    assert len({answer["hash"] for _, answer in answers}) == len(peers)
    eventually(lambda: set(chain.peers_of(service.service.address)) == set(peers))


# ---- bad input


# The fields of all calls together, all of them right.
COMPLETE = {
    "orgId": "hivewright",
    "peerId": PEER,
    "roundNumber": 0,
    "stageNumber": 0,
    "reward": 1,
    "winners": ["a"],
    "publicKey": "",
    "signature": "",
    "token": ENROLMENT_TOKEN,
}


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("register-peer", b"", "body: Invalid JSON: EOF while parsing a value at line 1 column 0"),
        ("register-peer", b"[" * 10_000, "body: Invalid JSON: recursion limit exceeded"),
        ("register-peer", b'{"orgId": "a\xff"}', "body: Invalid JSON: invalid unicode code point"),
        ("register-peer", [], "body: expected an object"),
        ("register-peer", {"orgId": "hivewright"}, "peerId: missing"),
        ("register-peer", {"orgId": 1, "peerId": PEER}, "orgId: got 1; expected a valid string"),
        (
            "register-peer",
            {"orgId": "a", "peerId": "O\n"},
            "peerId: got 'O\\n'; expected String should match pattern",
        ),
        ("register-peer", {"orgId": "a", "peerId": "1" * 129}, "peerId: got '111"),
        ("submit-reward", {"roundNumber": "1"}, "orgId: missing"),
        ("submit-reward", {"roundNumber": True}, "roundNumber: got True; expected a valid integer"),
        (
            "submit-reward",
            {"roundNumber": -1},
            "roundNumber: got -1; expected greater than or equal to 0",
        ),
        ("submit-reward", {"reward": 0.5}, "reward: got 0.5; expected a valid integer"),
        ("submit-reward", {"reward": 2**127}, "reward: got 1701411834604692317316873037158841"),
        ("submit-winner", {"winners": "QmYou"}, "winners: got 'QmYou'; expected a valid array"),
        ("submit-winner", {"winners": ["QmYou", 1]}, "winners/1: got 1; expected a valid string"),
        ("submit-winner", {"winners": ["a"] * 65}, "winners: got ['a', "),
        ("enrol", {"publicKey": "!"}, "publicKey: expected base 64"),
        ("enrol", {"signature": "!"}, "signature: expected base 64"),
    ],
)
def test_wrong_body_is_refused_with_one_line(service, token, path, body, error) -> None:
    if path != "register-peer" and error != "orgId: missing":
        body = COMPLETE | body
    status, answer = post(service, f"/api/{path}", body, token)
    assert status == 400
    assert answer["error"].startswith(error)
    assert "\n" not in answer["error"]


def test_too_long_body_is_refused(service, token) -> None:
    status, answer = post(service, "/api/register-peer", b" " * 300_000, token)
    assert (status, answer) == (413, {"error": "/api/register-peer: Request Entity Too Large"})


def connected(service, head: str, body: bytes) -> socket.socket:
    """Open a connection and send the beginning of a request for a token."""
    connection = socket.create_connection(
        ("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=10
    )
    lines = ("POST /api/enrol HTTP/1.1", "Host: x", "Content-Type: application/json", head)
    connection.sendall("\r\n".join((*lines, "", "")).encode() + body)
    return connection


def test_compressed_body_is_refused(service) -> None:
    """A few bytes could expand to a gigabyte."""
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    answer = requests.post(service.url + "/api/enrol", data=b"{}", headers=headers, timeout=10)
    assert (answer.status_code, answer.json()) == (
        415,
        {"error": "Content-Encoding: got a compressed body; send it uncompressed"},
    )


def test_client_that_leaves_within_its_body_is_not_logged(service, caplog, monkeypatch) -> None:
    left = threading.Event()
    debug = server.log.debug
    monkeypatch.setattr(server.log, "debug", lambda *said: (debug(*said), left.set()))
    connected(service, "Content-Length: 50", b"half").close()
    assert left.wait(10)
    assert (
        requests.get(service.url + "/api/get-api-key-status?orgId=x", timeout=10).status_code == 200
    )
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def test_body_that_does_not_come_in_time_is_refused(service, monkeypatch) -> None:
    monkeypatch.setattr(server, "_READ_SECONDS", 0.2)
    with connected(service, "Content-Length: 50", b"half") as connection:
        said = connection.recv(4096).decode()
    assert said.startswith("HTTP/1.1 408 ")
    assert said.endswith('{"error": "body: not complete after 0.2 s; send it faster"}')


def test_unknown_path_and_method_are_refused_in_json(service) -> None:
    assert post(service, "/api/nothing", {})[0] == 404
    answer = requests.get(service.url + "/api/enrol", timeout=10)
    assert (answer.status_code, answer.json()) == (405, {"error": "/api/enrol: Method Not Allowed"})


# ---- tokens


def test_token_of_nobody_of_another_or_made_up_is_refused_by_name(
    chain, service, token, tmp_path
) -> None:
    (tmp_path / "other").mkdir()
    assert register(service, None)[1]["error"] == "TokenMissing"
    for made_up in (
        "x",
        "é",
        PEER,
        PEER + ".",
        token[:-1],
        token + "0",
        Tokens(tmp_path / "other").issue(PEER),
    ):
        status, answer = register(service, made_up.encode().decode("latin-1"))
        assert (status, answer["error"]) == (401, "TokenWrong"), made_up
    status, answer = register(service, token, peerId="QmYou")
    assert (status, answer["error"]) == (403, "TokenOfAnotherPeer")
    assert register(service, token, orgId="else") == (404, {"error": "User not found"})
    assert chain.coordinator.nonce(service.service.address) == 0


def enrol_body(node, **changes: str) -> dict[str, str]:
    signature = node.sign(b"hivewright-enrol/" + node.peer_id.encode())
    return {
        "peerId": node.peer_id,
        "publicKey": base64.b64encode(node.public_key).decode(),
        "signature": base64.b64encode(signature).decode(),
        "token": ENROLMENT_TOKEN,
    } | changes


def test_enrolment_gives_the_token_of_the_peer_that_signed(service, node, tmp_path) -> None:
    status, answer = post(service, "/api/enrol", enrol_body(node))
    assert status == 200
    assert Tokens(tmp_path / "account").peer_of(answer["token"]) == node.peer_id
    assert register(service, answer["token"], peerId=node.peer_id)[0] == 200


def test_enrolment_with_wrong_token_key_or_signature_is_refused_by_name(
    service, node, tmp_path_factory
) -> None:
    other = some_identity(tmp_path_factory.getbasetemp(), 1)
    for error, changes in (
        ("EnrolmentTokenWrong", {"token": "é"}),
        ("SignatureWrong", {"peerId": other.peer_id}),
        (
            "SignatureWrong",
            {"signature": base64.b64encode(node.sign(node.peer_id.encode())).decode()},
        ),
        ("SignatureWrong", {"publicKey": base64.b64encode(other.public_key).decode()}),
    ):
        status, answer = post(service, "/api/enrol", enrol_body(node, **changes))
        assert (status, answer["error"]) == (403, error)


def test_enrolment_is_closed_without_a_token_file(chain, node, tmp_path) -> None:
    parsed = account_settings(chain.settings, tmp_path / "account")
    closed = parsed.account.model_copy(update={"enrolment_token_file": None})
    with serving(parsed.model_copy(update={"account": closed})) as service:
        status, answer = post(service, "/api/enrol", enrol_body(node))
    assert (status, answer["error"]) == (403, "EnrolmentClosed")


# ---- the way to the chain


def rpc(service, method: str, params: object = (), id: object = 7) -> tuple[int, dict]:
    asked = {"jsonrpc": "2.0", "id": id, "method": method, "params": params}
    return post(service, "/rpc", asked, service.token_of(PEER))


def test_rpc_passes_reads_on(service) -> None:
    assert rpc(service, "eth_chainId", id="x") == (
        200,
        {"jsonrpc": "2.0", "id": "x", "result": "0x7a69"},
    )


@pytest.mark.parametrize("fault", ["drop", "error", "elsewhere"])
def test_rpc_goes_to_the_next_address_when_one_fails(chain, tmp_path, fault) -> None:
    parsed = account_settings(chain.settings, tmp_path / "account")
    with faulty(chain.deployment.rpc_url, lambda _: fault) as bad:
        both = parsed.chain.model_copy(update={"rpc_url": (bad.url, chain.deployment.rpc_url)})
        with serving(parsed.model_copy(update={"chain": both})) as service:
            for _ in range(3):
                answer = rpc(service, "eth_getBalance", ["0x" + "17" * 20, "latest"])[1]
                assert answer["result"] == "0x0"
        assert len(bad.seen) <= 4


def test_digest_of_the_groups_goes_into_the_transaction(chain, service, token) -> None:
    assert register(service, token)[0] == 200
    body = {"orgId": "hivewright", "peerId": PEER, "roundNumber": 0, "stageNumber": 0, "reward": 9}
    eventually(lambda: chain.coordinator.owner_of(PEER))
    assert post(service, "/api/submit-reward", body | {"groupsDigest": "AB" * 32}, token)[0] == 400
    status, answer = post(service, "/api/submit-reward", body | {"groupsDigest": "ab" * 32}, token)
    assert status == 200
    assert chain.coordinator.wait_for_receipt(answer["hash"], 10).succeeded
    assert chain.coordinator.submitted_reward(0, 0, PEER) == 9
    assert chain.coordinator.reward_digest(answer["hash"]) == "ab" * 32


@pytest.mark.parametrize(
    "method",
    [
        "anvil_setBalance",
        "evm_mine",
        "eth_sendTransaction",
        "personal_sign",
        "debug_traceCall",
        "ETH_CALL",
    ],
)
def test_rpc_refuses_what_is_not_on_the_list(service, method) -> None:
    error = {"code": -32601, "message": f"{method}: not served here"}
    assert rpc(service, method) == (200, {"jsonrpc": "2.0", "id": 7, "error": error})


def test_rpc_takes_no_doubled_keys(service, token) -> None:
    call = (
        b'{"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "method": "anvil_mine",'
        b' "params": []}'
    )
    assert post(service, "/rpc", call, token)[1]["error"]["code"] == -32601


def test_rpc_answers_nobody_without_a_token(service, token) -> None:
    asked = {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}
    assert post(service, "/rpc", asked)[1]["error"] == "TokenMissing"
    assert post(service, "/rpc", asked, token[:-1])[1]["error"] == "TokenWrong"
    assert post(service, "/rpc", asked, token)[0] == 200


def test_rpc_checks_each_request_of_a_batch_as_a_single_one(service, token) -> None:
    methods = ("eth_chainId", "anvil_mine", "eth_blockNumber")
    asked = [
        {"jsonrpc": "2.0", "id": i, "method": method, "params": []}
        for i, method in enumerate(methods)
    ]
    status, answers = post(service, "/rpc", asked, token)
    assert (status, [answer["id"] for answer in answers]) == (200, [0, 1, 2])
    assert answers[0]["result"] == "0x7a69"
    assert answers[1]["error"]["message"] == "anvil_mine: not served here"
    assert "result" in answers[2]
    for wrong in ([], asked * 7):
        assert post(service, "/rpc", wrong, token)[1]["error"].startswith(
            f"body: got a batch of {len(wrong)}"
        )
    assert post(service, "/rpc", [*asked, 1], token)[0] == 400


def test_rpc_has_a_limit_for_each_peer(service, token, monkeypatch) -> None:
    monkeypatch.setattr(service.service, "_requests", Quota(0.0, 3))
    assert [rpc(service, "eth_chainId")[0] for _ in range(5)] == [200, 200, 200, 429, 429]
    asked = {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}
    assert post(service, "/rpc", asked, service.token_of("QmYou"))[0] == 200


def asking(service, body: bytes) -> socket.socket:
    """Open a connection with a request to /rpc and a small buffer, and do not read the answer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, _, port = service.url.removeprefix("http://").rpartition(":")
    connection.connect((host, int(port)))
    head = (
        "POST /rpc HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length:"
        f" {len(body)}\r\n"
    )
    connection.sendall(
        f"{head}Authorization: Bearer {service.token_of(PEER)}\r\n\r\n".encode() + body
    )
    return connection


def test_answers_of_rpc_that_nobody_reads_count_for_their_peer(service, token, monkeypatch) -> None:
    async def long_answer(*_: object) -> bytes:
        return b'"' + b"x" * 8_000_000 + b'"'

    monkeypatch.setattr(service.service, "_answer", long_answer)
    asked = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}).encode()
    with contextlib.ExitStack() as stack:
        unread = [stack.enter_context(asking(service, asked)) for _ in range(4)]
        eventually(lambda: service.service._at_chain_for[PEER] == 4, 10)
        status, answer = post(service, "/rpc", asked, token)
        assert (status, answer["error"]) == (429, "TooManyRequests")
        # The chain is free meanwhile, and so is everybody else.
        assert post(service, "/rpc", asked, service.token_of("QmYou"))[0] == 200
        for each in unread:
            each.close()
        eventually(lambda: PEER not in service.service._at_chain_for, 10)
        assert post(service, "/rpc", asked, token)[0] == 200


def guess(service, address: str | None) -> int:
    headers = {"Authorization": "Bearer made-up"} | (
        {"X-Forwarded-For": address} if address else {}
    )
    return requests.post(f"{service.url}/rpc", json={}, headers=headers, timeout=20).status_code


def test_guesses_of_tokens_are_limited_by_client(chain, service, tmp_path, node) -> None:
    assert [guess(service, None) for _ in range(22)] == [401] * 20 + [429] * 2
    # Whatever a client says of where it comes from.
    assert guess(service, "192.0.2.1") == 429
    wrong = enrol_body(node, token="made up")
    assert [post(service, "/api/enrol", wrong)[0] for _ in range(22)] == [403] * 20 + [429] * 2
    assert (
        post(service, "/api/enrol", enrol_body(node))[0] == 429
    )  # nor is it told that it has guessed right


def test_guesses_that_come_through_a_proxy_of_this_machine_keep_out_their_client_alone(
    chain, tmp_path, node
) -> None:
    parsed = account_settings(chain.settings, tmp_path / "account")
    behind = parsed.account.model_copy(update={"behind_proxy": True})
    with serving(parsed.model_copy(update={"account": behind})) as service:
        assert [guess(service, f"2001:db8::{number:x}") for number in range(22)] == [401] * 20 + [
            429
        ] * 2
        assert guess(service, "2001:db8::1, 192.0.2.1") == 401  # the proxy adds the last one
        assert guess(service, None) == 401


def test_endless_loop_through_rpc_stops_nothing(chain, service, token) -> None:
    """In an earlier version a single request with endless code stopped the chain."""
    loop = {"data": "0x5b600056", "gas": "0xffffffffffff"}
    for method in ("eth_call", "eth_estimateGas"):
        for tried in (
            loop,
            {**loop, "to": chain.owner.address},
            {**loop, "to": chain.deployment.contract},
        ):
            assert rpc(service, method, [tried, "latest"])[1]["error"]["code"] == -32602
    assert register(service, token)[0] == 200
    eventually(lambda: chain.coordinator.owner_of(PEER), 5)


def test_rpc_takes_signed_transactions_to_the_contract_only_and_not_too_many(
    chain, service, monkeypatch
) -> None:
    account = Account.create()
    create = Call("x", bytes.fromhex("6001600055"), None)
    calls = [create, Call("x", b"", account.address), chain.coordinator.register_peer("QmYou")]
    monkeypatch.setattr(service.service, "_sends", Quota(0.0, 1))
    said = []
    for call in calls:
        _, raw = chain.coordinator.sign(account, call, nonce=0, gas=1_000_000, gas_price_wei=0)
        said.append(rpc(service, "eth_sendRawTransaction", ["0x" + raw.hex()])[1])
    assert "creates a contract" in said[0]["error"]["message"]
    assert "expected the swarm's contract" in said[1]["error"]["message"]
    eventually(lambda: chain.coordinator.owner_of("QmYou") == account.address, 10)
    _, raw = chain.coordinator.sign(account, calls[2], nonce=1, gas=1_000_000, gas_price_wei=0)
    assert rpc(service, "eth_sendRawTransaction", ["0x" + raw.hex()])[1]["error"]["code"] == -32005


def test_rpc_can_be_switched_off(chain, tmp_path) -> None:
    parsed = account_settings(chain.settings, tmp_path / "account")
    closed = parsed.account.model_copy(update={"rpc_proxy": False})
    with serving(parsed.model_copy(update={"account": closed})) as service:
        assert rpc(service, "eth_chainId")[0] == 404


def test_service_stays_up_without_a_chain_and_works_once_there_is_one(chain, tmp_path) -> None:
    parsed = account_settings(chain.settings, tmp_path / "account")
    missing = tmp_path / "later.json"
    later = parsed.chain.model_copy(update={"rpc_url": None, "deployment_file": missing})
    with serving(parsed.model_copy(update={"chain": later})) as service:
        token = Tokens(tmp_path / "account").issue(PEER)
        for status, answer in (register(service, token), rpc(service, "eth_chainId")):
            assert (status, answer["error"]) == (503, "ChainUnreachable")
        assert requests.get(service.url + "/api/swarm", timeout=10).status_code == 503
        missing.write_text(chain.settings.chain.deployment_file.read_text())
        assert register(service, token)[0] == 200
        swarm = requests.get(service.url + "/api/swarm", timeout=10).json()
        assert swarm.pop("challenge")
        assert swarm == {
            "chain_id": 31337,
            "contract": chain.deployment.contract,
            "org_id": "hivewright",
            "account": service.service.address,
            "market": None,
            "judge_url": None,
        }


def test_outage_is_logged_when_it_begins_and_when_it_ends(chain, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "worker.account.server")
    is_away = threading.Event()
    with faulty(
        chain.deployment.rpc_url, lambda seen: "drop" if is_away.is_set() else None
    ) as proxy:
        parsed = account_settings(chain.settings, tmp_path / "account")
        parsed = parsed.model_copy(
            update={"chain": parsed.chain.model_copy(update={"rpc_url": proxy.url})}
        )
        with serving(parsed) as service:
            for away, status in (
                (False, 200),
                (True, 503),
                (True, 503),
                (False, 200),
                (False, 200),
            ):
                (is_away.set if away else is_away.clear)()
                assert rpc(service, "eth_chainId")[0] == status
    first, second = caplog.messages
    assert first.startswith(
        f"chain unreachable, calls that need it get status=503 error={proxy.url}: no answer"
    )
    assert second == "chain answers again"


def test_slow_chain_does_not_stop_the_event_loop(chain, tmp_path) -> None:
    released = threading.Event()

    def wait(seen: str) -> None:
        released.wait(2)

    with faulty(chain.deployment.rpc_url, wait) as proxy:
        parsed = account_settings(chain.settings, tmp_path / "account")
        parsed = parsed.model_copy(
            update={"chain": parsed.chain.model_copy(update={"rpc_url": proxy.url})}
        )
        with serving(parsed) as service, concurrent.futures.ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(register, service, Tokens(tmp_path / "account").issue(PEER))
            eventually(lambda: proxy.seen)
            assert (
                requests.get(service.url + "/api/get-api-key-status?orgId=x", timeout=10).text
                == "pending"
            )
            assert not waiting.done()
            released.set()
            assert waiting.result(30)[0] == 200


# ---- keys and files


def test_account_key_and_secret_are_made_once_and_are_private(tmp_path) -> None:
    first, token = load_account(tmp_path).address, Tokens(tmp_path).issue(PEER)
    assert (load_account(tmp_path).address, Tokens(tmp_path).issue(PEER)) == (first, token)
    for name in ("account.key", "token.secret"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [None, "", "0x12", "0x" + "00" * 32, "0x" + "ff" * 32])
def test_lost_or_broken_account_key_is_never_replaced(tmp_path, content) -> None:
    load_account(tmp_path)
    Tokens(tmp_path)
    (tmp_path / "account.key").unlink()
    if content is not None:
        (tmp_path / "account.key").write_text(content)
    with pytest.raises(
        (IdentityError, SecretError), match=r"account\.key: .*restore it from its backup"
    ):
        load_account(tmp_path)
    assert content is None or (tmp_path / "account.key").read_text() == content


def test_empty_enrolment_token_file_is_refused(chain, tmp_path) -> None:
    parsed = account_settings(chain.settings, tmp_path / "account")
    parsed.account.enrolment_token_file.write_text("\n")
    with pytest.raises(
        SettingsError, match=r"enrolment\.token \(account\.enrolment_token_file\): is empty"
    ):
        server.Service(parsed)


# ---- the role as a process


def write_settings(folder: Path, **account: object) -> Path:
    raw = {
        "chain": {"rpc_url": "http://127.0.0.1:9", "contract": "0x" + "11" * 20},
        "account": {"state_dir": str(folder / "account"), "port": 0} | account,
    }
    file = folder / "account.yaml"
    file.write_text(settings.dump(settings.parse(raw, "test")))
    return file


def test_process_serves_without_a_chain_and_ends_cleanly(tmp_path) -> None:
    command = [sys.executable, "-m", "worker", "account", "--settings", write_settings(tmp_path)]
    process = preloaded.Popen(command, "worker.account.server", stderr=subprocess.PIPE)
    try:
        address = tmp_path / "account/address"
        eventually(lambda: address.exists() or process.poll() is not None, 60)
        answer = requests.get(
            address.read_text().strip() + "/api/get-api-key-status?orgId=hivewright", timeout=10
        )
        assert answer.text == "activated"
        with pytest.raises(ResourceError, match="in use by process"):
            server.run(settings.load(tmp_path / "account.yaml"))
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[1]
        assert process.returncode == 0, said
        assert "Traceback" not in said
    finally:
        process.kill()
        process.wait(10)


def test_port_in_use_is_a_resource_error(tmp_path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        expected = (
            f"port {port} (account.port): already in use on 127.0.0.1; free it or set another, 0"
            " lets the kernel choose"
        )
        with pytest.raises(ResourceError) as caught:
            server.run(settings.load(write_settings(tmp_path, port=port)))
    assert str(caught.value) == expected


def test_service_without_a_chain_of_its_own_is_refused(tmp_path) -> None:
    chainless = settings.parse({"account": {"state_dir": str(tmp_path)}}, "test")
    with pytest.raises(
        SettingsError, match=r"chain\.rpc_url and chain\.deployment_file: both empty"
    ):
        server.run(chainless)
